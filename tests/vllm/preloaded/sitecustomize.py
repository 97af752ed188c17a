"""Python imports it when it starts: so the processes that a server starts have the shim as well."""

import tests.vllm.shim  # noqa: F401
