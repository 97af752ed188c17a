"""Checks the modules that adapters are for: PEFT takes those that the model has, and ignores the others."""

import re
from typing import Any

from torch import nn

# What PEFT expects between a given name and the path in front of it.
FIELDS = {"target_modules": ".", "modules_to_save": ""}


def check_targets(peft_config: Any, model: nn.Module) -> None:
    """Looks for each module that is named.

    Args:
        peft_config: of any method of PEFT.
        model: to be adapted.

    Raises:
        ValueError: there is no such module.
    """
    paths = [f".{path}" for path, _ in model.named_modules() if path]
    for field, separator in FIELDS.items():
        given = getattr(peft_config, field, None) or ()
        if isinstance(given, str):
            found = given == "all-linear" or any(_is_pattern_of(given, path[1:]) for path in paths)
            missing = [] if found else [given]
        else:
            missing = sorted(name for name in given if not any(path.endswith(separator + name) for path in paths))
        if missing:
            layers = (path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding))
            raise ValueError(
                f"`{field}` names `{missing[0]}`, but no module of the model is called that: give some of "
                f"{sorted({path.rpartition('.')[2] for path in layers})}, or leave it out."
            )


def _is_pattern_of(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise ValueError(f"`{pattern}` is no regular expression ({error}): correct it, or give a list.") from error
