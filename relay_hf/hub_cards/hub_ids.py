"""Names of the Hub, apart from paths of this machine, which mean nothing on another."""

from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id


def is_hub_id(name: str | None) -> bool:
    """Whether a name is one of a model or data set on the Hub: "namespace/name", and no path of this machine."""
    if name is None or name.count("/") != 1 or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def link_model(name: str) -> str:
    """A link to the Hub; of a folder only its own name, because the path means nothing on another machine."""
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{Path(name).name}`"
