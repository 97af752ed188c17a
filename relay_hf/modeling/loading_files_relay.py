"""Files of a checkpoint that cannot be read: one sentence names what is wrong, whatever library stumbles over it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch

# transformers goes on without some of these if they are damaged, as if there were none.
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def check_json_files(source: Any) -> None:
    """Reads the small files of a checkpoint in a folder; anything else passes.

    Raises:
        OSError: one is no JSON, holds no names and values, or names weights that are missing.
    """
    if not isinstance(source, str | PathLike) or not Path(source).is_dir():
        return
    for path in [path for name in JSON_FILES if (path := Path(source) / name).exists()]:
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(fields, dict):
                raise ValueError(f"it holds a {type(fields).__name__}, not names and values")
            shards = set(fields["weight_map"].values()) if path.name.endswith(".index.json") else set()
            if missing := sorted(name for name in shards if not (Path(source) / name).is_file()):
                raise ValueError(f"it names `{missing[0]}`, which is missing")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise OSError(f"`{path}` cannot be read ({reason}): the file is damaged, get it again.") from error


@contextmanager
def explained(source: Any, part: str) -> Iterator[None]:
    """Turns what libraries raise over damaged files into an OSError that names the checkpoint.

    Args:
        source: of the checkpoint.
        part: what is read of it.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    # Each library has errors of its own, up to a plain `Exception`.
    except Exception as error:
        raise unreadable(source, part, error) from error


def unreadable(source: Any, part: str, error: Exception) -> OSError:
    """The error that says of a part of a checkpoint what a library says of one of its files."""
    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    return OSError(
        f"The {part} of `{source}` cannot be read ({reason}): a file is damaged, or of another model; get it again."
    )
