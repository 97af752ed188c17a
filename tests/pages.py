"""What the pages for readers (README, docs and their like) contain: snippets, commands, links and headings."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
OTHERS = ("CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md", "benchmarks/README.md")
PAGES = [README, *(ROOT / name for name in OTHERS), *sorted((ROOT / "docs").rglob("*.md"))]

# A snippet that begins so is compiled, not run; readers see why.
NOT_RUN = "# Not run in CI: "
PROGRAMS = ("relay-hf ", "make ", "python ", "pip ", "accelerate ")
FENCE = re.compile(r"^( *)```(.*?)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


class Snippet(NamedTuple):
    """A fenced block of code.

    Args:
        language: what stands behind the fence; "" if nothing does.
        line: number of its first line in the page.
        code: what is inside, without the fence.
    """

    language: str
    line: int
    code: str


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read_snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    return [
        Snippet(found[2].strip(), text[: found.start(3)].count("\n") + 1, found[3]) for found in FENCE.finditer(text)
    ]


def python_snippets(page: Path) -> list[Snippet]:
    return [snippet for snippet in read_snippets(page) if snippet.language == "python"]


def fenced_commands(page: Path) -> list[list[str]]:
    """The lines of its blocks that call one of our programs, in words; what stands behind a # is left out."""
    blocks = [snippet.code for snippet in read_snippets(page) if snippet.language in ("", "bash", "sh", "shell")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [_words(line) for line in lines if line.startswith(PROGRAMS)]


def inline_commands(page: Path) -> list[list[str]]:
    """The same, within sentences. They may leave arguments out."""
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", without_snippets(page))
    commands = (" ".join(span.split()) for span in spans)
    return [_words(command) for command in commands if command.startswith(PROGRAMS)]


def _words(command: str) -> list[str]:
    """Without comments, and without what the shell does with files and pipes."""
    words = shlex.split(command, comments=True)
    return words[: next((i for i, word in enumerate(words) if word in ("<", ">", ">>", "|", "&&")), len(words))]


def without_snippets(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[tuple[str, str]]:
    """Path (as written) and anchor of each link and picture within the repository; either may be empty."""
    targets = re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", without_snippets(page))
    return [(path, anchor) for path, _, anchor in (target.partition("#") for target in targets)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives its headings; `mkdocs.yml` sets the same rule for the site."""
    headings = re.findall(r"^#+ +(.+?) *#*$", without_snippets(page), flags=re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}
