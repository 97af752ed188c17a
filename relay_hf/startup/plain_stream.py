"""Keeps colours out of files and pipes, also colours of libraries that write them everywhere."""

import re
from typing import Any, TextIO

# Colours, and moves of the cursor (ECMA-48).
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class PlainStream:
    """A stream without escape sequences; all other attributes are those of the wrapped stream."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes the text without its escape sequences; returns the length of the text."""
        self.stream.write(ESCAPES.sub("", text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
