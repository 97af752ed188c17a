"""The program in a chat answer. Whatever a model writes, this returns text and never raises."""

import ast
import re
import symtable
import warnings
from collections.abc import Iterator

OPENING, CLOSING = re.compile(r"^\s*```[ \t]*[^\s`].*$"), re.compile(r"^\s*```\s*$")
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def extract_code(answer: str, entry_point: str, given: str = "") -> str:
    """Finds the program that defines a function.

    - Of several code blocks, the first that is Python and defines the function counts. If there is none, the first that
      defines it does, else the first of all, cut where it stops being Python.
    - Only what the function can need is kept: imports, definitions, and statements that assign to what those use.
      Trials such as `print(f(3))` and `n = int(input())` would run otherwise.
    - What the question gave stands before it, so that an answer need not repeat it; only `from __future__` goes first.

    Args:
        answer: what the model wrote behind an opening "```python".
        entry_point: name of the function.
        given: Python text in front of the function in the question.

    Returns:
        A program; if the answer is not Python, whatever it is.
    """
    blocks = [block for block in _blocks(answer) if block.strip()] or [""]
    defining = [
        block for block in blocks if re.search(rf"^(async )?def {re.escape(entry_point)}\b", block, re.MULTILINE)
    ]
    whole = [block for block in defining if isinstance(_parse(block), ast.Module)]
    code = _keep_needed(_longest_python((whole or defining or blocks)[0]), entry_point)
    if not given:
        return code
    lines = code.split("\n")
    first = [line for line in lines if line.startswith("from __future__ ")]
    return "\n".join([*first, given, "\n", *[line for line in lines if line not in first]])


def _blocks(answer: str) -> Iterator[str]:
    """The code blocks of a text that begins within one; the last may lack its end. At least one."""
    lines: list[str] | None = []
    for line in re.split(r"\r\n|\r|\n", answer):
        if OPENING.match(line):
            # A fence that names a language never closes a block: the model began anew.
            if lines is not None:
                yield "\n".join(lines)
            lines = []
        elif CLOSING.match(line):
            if lines is not None:
                yield "\n".join(lines)
            lines = [] if lines is None else None
        elif lines is not None:
            lines.append(line)
    if lines is not None:
        yield "\n".join(lines)


def _parse(code: str) -> ast.Module | SyntaxError | None:
    """The tree of a program, or what is wrong; None if that has no place in it."""
    with warnings.catch_warnings(action="ignore"):  # of invalid escape sequences
        try:
            return ast.parse(code)
        except SyntaxError as error:
            return error
        except (ValueError, RecursionError, MemoryError):
            return None


def _longest_python(code: str) -> str:
    """The longest run of lines from the top that is Python and not empty; everything if there is none."""
    lines = code.split("\n")
    end = len(lines)
    while end > 0:
        tree = _parse("\n".join(lines[:end]))
        if isinstance(tree, ast.Module):
            return "\n".join(lines[:end]) if tree.body else code
        # What is wrong in a line is wrong in every run that holds it. Trying each took minutes for a long answer.
        wrong = tree.lineno if tree and tree.lineno else end
        end = min(end, wrong) - 1
    return code


def _keep_needed(code: str, entry_point: str) -> str:
    tree = _parse(code)
    if not isinstance(tree, ast.Module):
        return code
    definitions = [node for node in tree.body if isinstance(node, DEFINITIONS)]
    others = [node for node in tree.body if not isinstance(node, (*DEFINITIONS, ast.Expr, ast.Assert))]
    try:
        used = {entry_point}.union(*(_names(node)[0] for node in definitions))
        kept = list[ast.stmt](definitions)
        # From the end: what an assignment uses stands before it.
        for node in reversed(others):
            read, assigned = _names(node)
            if assigned & used:
                used |= read
                kept.append(node)
    except (SyntaxError, ValueError, RecursionError):  # it can be parsed, but not compiled
        return code
    numbers: set[int] = set()
    for node in kept:
        decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
        numbers |= set(range(min([node.lineno, *decorators]), (node.end_lineno or node.lineno) + 1))
    return "\n".join(line for number, line in enumerate(code.split("\n"), 1) if number in numbers)


def _names(node: ast.stmt) -> tuple[set[str], set[str]]:
    """Global names that a statement reads, those in functions included; and those that it assigns to, or to parts of.

    Names of local variables are neither: that of a trial is often one of them, too.
    """
    module = symtable.symtable(ast.unparse(node), "", "exec")
    read = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_referenced()}
    assigned = {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported()}
    tables = module.get_children()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        read |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    for part in ast.walk(node):
        # `TABLE[0] = 1` reads `TABLE`, as far as symbols are concerned.
        if isinstance(part, (ast.Subscript, ast.Attribute)) and isinstance(part.ctx, ast.Store):
            root: ast.expr = part
            while isinstance(root, (ast.Subscript, ast.Attribute)):
                root = root.value
            if isinstance(root, ast.Name):
                assigned.add(root.id)
    return read, assigned
