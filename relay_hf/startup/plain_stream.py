"""Keeps colours out of files and pipes, also those of libraries that do not ask where their words go."""

import re
from typing import Any, TextIO

# Colours, and moves of the cursor (ECMA-48).
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class PlainStream:
    """A stream to which no escape sequences are written; everything else is that of the stream itself."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes the text without its escape sequences; returns the length of the text."""
        self.stream.write(ESCAPES.sub("", text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
