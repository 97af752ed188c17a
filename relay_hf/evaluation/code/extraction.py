"""The program in a chat answer. Whatever a model writes, this returns text and never raises."""

import ast
import builtins
import re
from collections.abc import Iterator

from .needed import FUNCTIONS, names_of, needed_lines, parse_python

FENCE = re.compile(r"^\s*(`{3,}|~{3,})[ \t]*([^\s`].*)?$")
# Lines that a program can begin with, below prose.
BEGINNING = re.compile(r"^(async def|def|class|import|from) |^@")


def extract_code(answer: str, entry_point: str, given: str = "") -> str:
    """Finds the program that defines a function.

    - Of several code blocks, the first that is Python and defines the function with a body counts. If there is none,
      the first that defines it does, else the first of all, cut to what is Python of it. What it lacks of names
      comes from the other blocks.
    - Only what the function can need is kept: imports, definitions, and statements that make what those use.
      Trials such as `print(f(3))` and `n = int(input())` would run otherwise.
    - The code that the question gave comes first, so an answer need not repeat it; only `from __future__` goes before.

    Args:
        answer: the model's text behind an opening "```python".
        entry_point: name of the function.
        given: Python text in front of the function in the question.

    Returns:
        A program; if the answer is not Python, whatever it is.
    """
    blocks = [block for block in map(_dedented, _blocks(answer)) if block.strip()] or [""]
    trees = {block: tree for block in blocks if isinstance(tree := parse_python(block), ast.Module)}
    defining = re.compile(rf"^(async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    candidates = [block for block in blocks if defining.search(block)]
    whole = [block for block in candidates if block in trees]
    written = [block for block in whole if not _is_stub(trees[block], entry_point)]
    chosen = (written or whole or candidates or blocks)[0]
    code = _longest_python(chosen, defining)
    others = [block for block in trees if block != chosen]
    code = needed_lines("\n".join([*_helpers(code, others), code]), entry_point)
    if not given:
        return code
    lines = code.split("\n")
    first = [line for line in lines if line.startswith("from __future__ ")]
    return "\n".join([*first, given, "\n", *[line for line in lines if line not in first]])


def _blocks(answer: str) -> Iterator[str]:
    """The code blocks of a text that begins within one; the last may lack its end. At least one."""
    lines: list[str] | None = []
    opened = "```"
    text = re.split(r"\r\n|\r|\n", answer)
    for number, line in enumerate(text):
        fence = FENCE.match(line)
        if fence is None or (lines is not None and _is_quoted(lines, text[number:])):
            if lines is not None:
                lines.append(line)
            continue
        marks, language = fence.groups()
        if lines is not None and not language and not marks.startswith(opened):
            lines.append(line)  # a shorter fence, or one of the other kind
            continue
        # A fence that names a language never closes a block: the model began anew.
        if lines is not None:
            yield "\n".join(lines)
        lines = [] if lines is None or language else None
        opened = marks
    if lines is not None:
        yield "\n".join(lines)


def _is_quoted(lines: list[str], rest: list[str]) -> bool:
    """Whether code ends within a text in triple quotes that is closed in what follows."""
    error = parse_python("\n".join(lines))
    if not isinstance(error, SyntaxError) or not error.msg.startswith("unterminated triple-quoted"):
        return False
    beginning = re.search("'''|\"\"\"", lines[(error.lineno or 1) - 1][(error.offset or 1) - 1 :])
    return beginning is not None and any(beginning[0] in line for line in rest)


def _dedented(block: str) -> str:
    """Without the indentation of its first line, as far as a line has it."""
    lines = block.split("\n")
    first = next((line for line in lines if line.strip()), "")
    width = len(first) - len(first.lstrip())
    return "\n".join(line[width:] if not line[:width].strip() else line.lstrip() for line in lines)


def _is_stub(tree: ast.Module, entry_point: str) -> bool:
    """Whether the function has nothing but a docstring, as where an answer repeats the question."""
    functions = [node for node in tree.body if isinstance(node, FUNCTIONS) and node.name == entry_point]
    return all(
        isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for function in functions[-1:]
        for node in function.body
    )


def _helpers(code: str, others: list[str]) -> list[str]:
    """Those of the other blocks that define names which the code, or one of them, only reads."""
    found: list[str] = []
    missing, made = _open_names(code)
    while block := next((b for b in others if b not in found and _open_names(b)[1] & (missing - made)), None):
        found.append(block)
        missing, made = missing | _open_names(block)[0], made | _open_names(block)[1]
    return [block for block in others if block in found]


def _open_names(code: str) -> tuple[set[str], set[str]]:
    """Names that a program reads and nothing built in defines, and those that it makes."""
    tree = parse_python(code)
    try:
        names = [names_of(node) for node in tree.body] if isinstance(tree, ast.Module) else []
    except (SyntaxError, ValueError, RecursionError):  # it can be parsed, but not compiled
        names = []
    read, made = set[str]().union(*(n.read for n in names)), set[str]().union(*(n.assigned for n in names))
    return read - set(dir(builtins)) - made, made


def _longest_python(code: str, defining: re.Pattern[str]) -> str:
    """The longest run of lines that is Python: from the top, or else from the first that gives the function."""
    lines = code.split("\n")
    top = _run_from(lines)
    if defining.search(top or ""):
        return str(top)
    starts = [number for number, line in enumerate(lines) if BEGINNING.match(line)] if defining.search(code) else []
    runs = (_run_from(lines[start:]) for start in starts)
    return next((run for run in runs if run and defining.search(run)), top or code)


def _run_from(lines: list[str]) -> str | None:
    """The longest run of lines from the top that is Python and not empty."""
    end = len(lines)
    while end > 0:
        tree = parse_python("\n".join(lines[:end]))
        if isinstance(tree, ast.Module):
            return "\n".join(lines[:end]) if tree.body else None
        # What is wrong in a line is wrong in every run that holds it. Trying each took minutes for a long answer.
        wrong = tree.lineno if tree and tree.lineno else end
        end = min(end, wrong) - 1
    return None
