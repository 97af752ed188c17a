"""Names of a package that are imported when they are first asked for (PEP 562), so that importing it costs little."""

import ast
import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_names(package: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package, for the names that it imports in its block `if TYPE_CHECKING`.

    So they are named once, for type checkers and at run time.

    Args:
        package: its `__name__`.
    """
    source = sys.modules[package].__loader__.get_source(package)  # type: ignore[attr-defined]
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    modules = {alias.name: node.module for node in imports for alias in node.names}

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{modules[name]}", package), name)

    return get
