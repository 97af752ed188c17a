"""Pieces of Markdown, and sections of a text that a person may have edited."""

import re
from collections.abc import Iterable, Mapping, Sequence

_FENCE = re.compile(r"\s*(`{3,}|~{3,})(.*)")
_HEADING = re.compile(r"(#+) ")


def bullets(lines: Iterable[str]) -> str:
    """A list; empty lines are left out."""
    return "\n".join(f"- {' '.join(line.split())}" for line in lines if line.strip())


def table(columns: Mapping[str, Sequence[str]], rule: str = "---") -> str:
    """A table, "" without rows; `rule` aligns all columns but the first: "---" to the left, "---:" to the right."""
    rows = list(zip(*columns.values(), strict=True))
    lines = [list(columns), ["---", *[rule] * (len(columns) - 1)], *rows] if rows else []
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def paragraphs(text: str) -> str:
    """The text without superfluous blank lines."""
    return re.sub(r"\n\s*\n", "\n\n", text.strip())


def sentence(text: str) -> str:
    """The text with a full stop, unless it ends in a mark."""
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else text + "."


def slug(text: str) -> str:
    """The text as part of a file's name: lower case, and a dash for whatever is neither letter nor digit."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")


def get_section(text: str, heading: str) -> str:
    """The text below a heading ("## Evaluation"), smaller headings included; "" without such a heading."""
    lines = text.splitlines()
    found = _find(lines, heading)
    return "\n".join(lines[found[0] + 1 : found[1]]).strip() if found else ""


def set_section(text: str, heading: str, body: str, before: Sequence[str] = ()) -> str:
    """Replaces the text below a heading, or removes the section if `body` is empty.

    Args:
        text: Markdown; lines in code blocks are no headings.
        heading: heading with its number signs.
        body: the new text.
        before: headings; a new section goes before the first of these that exists, else to the end.
    """
    lines = text.splitlines()
    found = _find(lines, heading)
    if found is None:
        places = [place[0] for place in (_find(lines, other) for other in before) if place]
        found = (min(places, default=len(lines)),) * 2
    begin, end = found
    section = f"{heading}\n\n{body.strip()}" if body.strip() else ""
    parts = ["\n".join(lines[:begin]).rstrip(), section, "\n".join(lines[end:]).strip()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _find(lines: Sequence[str], heading: str) -> tuple[int, int] | None:
    """The lines of a section: of its heading, and behind its end."""
    begin, level, fence = None, heading.count("#"), None
    for index, line in enumerate(lines):
        if (marker := _FENCE.match(line)) and fence is None:
            fence = marker[1]
        elif marker and fence is not None and marker[1].startswith(fence) and not marker[2].strip():
            fence = None
        if fence is not None:
            continue
        if begin is None:
            begin = index if line.strip() == heading else None
        elif (other := _HEADING.match(line)) and len(other[1]) <= level:
            return begin, index
    return None if begin is None else (begin, len(lines))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
