"""Writes files that are seen only when they are whole."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> Path:
    """Writes a text (UTF-8, line ends as they are) beside the file, and puts it in its place at once.

    Args:
        path: the file; folders that are missing are made.
        text: its new content.

    Returns:
        `path`.

    Raises:
        OSError: the file cannot be written; then the old one stays, and nothing half-written is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
