"""The options of a request, checked in the process where it arrives: the client gets a sentence and status 400.

vLLM asks the `validate_params` of logits processors, which are classes that it finds by name and that know no model. So
the class of a model is found under a name that says which checkpoint it is for, in any process.
"""

import functools
from typing import Any, ClassVar

from ..loading.checkpoint import read_diffusion_config, read_generation_config
from .internals import LogitsProcessor
from .options import OptionReader

PREFIX = "RelayChecks_"
# Parameters of vLLM's own that a relay model does not have, their neutral values, and what to do.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "top_p": ((1, None), "put it into `vllm_xargs` (`extra_args`), with `do_sample`"),
    "top_k": ((0, -1, None), "put it into `vllm_xargs` (`extra_args`), with `do_sample`"),
    "presence_penalty": ((0, None), "leave it out"),
    "frequency_penalty": ((0, None), "leave it out"),
    "repetition_penalty": ((1, None), "leave it out"),
    "logprobs": ((None,), "leave it out"),
    "prompt_logprobs": ((None,), "leave it out"),
}


class RelayChecks(LogitsProcessor):
    """A logits processor that leaves logits alone, and refuses requests.

    Attributes:
        reader: reads the options of requests to the model.
    """

    reader: ClassVar[OptionReader]

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Checks the parameters of a request.

        Raises:
            ValueError: the request asks for what a relay model, or the plug-in, cannot do.
        """
        for name, (neutral, what) in NEUTRAL.items():
            value = getattr(sampling_params, name)
            if value not in neutral:
                raise ValueError(f"`{name}={value}` is not supported for relay models: {what}.")
        cls.reader.read(sampling_params.extra_args)

    def apply(self, logits: Any, ctx: Any) -> Any:
        """Returns the logits; the sampler of relay models does not even call it."""
        return logits


def reader_of(source: str, revision: str | None = None, device: Any = "cpu") -> OptionReader:
    """Reads the options of requests to the checkpoint in a folder or on the Hub; `device`: where logits are.

    Raises:
        OSError, ValueError: as `read_diffusion_config` and `OptionReader`.
    """
    config = read_diffusion_config(source, revision)
    return OptionReader(config, read_generation_config(source, config, revision), device)


def name_of_checks(source: str, revision: str | None = None) -> str:
    """The name by which vLLM finds the class that checks requests to a checkpoint: `module:class`."""
    said = f"{source}\0{revision or ''}".encode().hex()
    return f"{__name__}:{PREFIX}{said}"


@functools.cache
def __getattr__(name: str) -> type[RelayChecks]:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    source, revision = bytes.fromhex(name.removeprefix(PREFIX)).decode().split("\0")
    return type(name, (RelayChecks,), {"reader": reader_of(source, revision or None)})
