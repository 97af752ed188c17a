"""Names of the Hub, apart from paths of this machine, which mean nothing on another."""

from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id


def is_hub_id(name: str | None) -> bool:
    """Whether a name is one of a model or data set on the Hub: "namespace/name", and no path of this machine."""
    return name is not None and not Path(name).exists() and is_repo_id(name)


def is_repo_id(name: str) -> bool:
    """Whether a name has the form "namespace/name" of the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def link_model(name: str) -> str:
    """A link to the Hub; of a folder only its own name, because the path means nothing on another machine."""
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{Path(name).name}`"
