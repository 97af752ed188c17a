"""What a function needs of the program around it: definitions, tables and what fills them, but no trials."""

import ast
import builtins
import symtable
import warnings
from dataclasses import dataclass

DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Built-in functions that change what they are given.
CHANGING = {"setattr", "delattr"}
LEAVING = {"exit", "quit", "_exit", "abort"}


@dataclass(frozen=True)
class Names:
    """Global names of a statement.

    Args:
        read: that it reads, in functions included.
        assigned: that it assigns to, or to parts of. Local variables of functions are neither.
        changed: whose methods it calls for their effect, or that it gives to a function for that.
        called: functions that it calls for their effect.
        sets_up: whether it sets an option of a module, as `sys.setrecursionlimit` does.
    """

    read: set[str]
    assigned: set[str]
    changed: set[str]
    called: set[str]
    sets_up: bool


def parse_python(code: str) -> ast.Module | SyntaxError | None:
    """The tree of a program, or what is wrong; None if that has no place in it."""
    with warnings.catch_warnings(action="ignore"):  # of invalid escape sequences
        try:
            return ast.parse(code)
        except SyntaxError as error:
            return error
        except (ValueError, RecursionError, MemoryError):
            return None


def names_of(node: ast.stmt) -> Names:
    """The names of a statement at the top of a program.

    Raises:
        SyntaxError, ValueError, RecursionError: the program can be parsed, but not compiled.
    """
    module = symtable.symtable(ast.unparse(node), "", "exec")
    read = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_referenced()}
    assigned = {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported()}
    tables = module.get_children()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        read |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        if not isinstance(node, ast.ClassDef):
            assigned |= {s.get_name() for s in table.get_symbols() if s.is_declared_global() and s.is_assigned()}
    changed, called, sets_up = set[str](), set[str](), False
    for part in ast.walk(node):
        # `TABLE[0] = 1` reads `TABLE`, as far as symbols are concerned.
        if isinstance(part, (ast.Subscript, ast.Attribute)) and isinstance(part.ctx, ast.Store):
            assigned |= _root(part)
        elif isinstance(part, ast.Expr) and isinstance(part.value, ast.Call):
            function = part.value.func
            name = getattr(function, "attr", getattr(function, "id", ""))
            if name in LEAVING or (isinstance(function, ast.Name) and hasattr(builtins, name) and name not in CHANGING):
                continue
            called |= {name} if isinstance(function, ast.Name) else set()
            changed |= _root(function) if isinstance(function, ast.Attribute) else set()
            changed |= {argument.id for argument in part.value.args if isinstance(argument, ast.Name)}
            sets_up |= isinstance(function, ast.Attribute) and name.startswith("set")
    return Names(read, assigned, changed, called, sets_up)


def needed_lines(code: str, entry_point: str) -> str:
    """The program without its trials; unchanged if it is not Python.

    Imports and definitions stay. Other statements stay if they assign to what those use, or change what the function
    itself can reach: by a method, by a function that is given it, or by one that knows it.

    Args:
        code: the program.
        entry_point: name of the function.
    """
    tree = parse_python(code)
    if not isinstance(tree, ast.Module):
        return code
    try:
        names = {node: names_of(node) for node in tree.body}
    except (SyntaxError, ValueError, RecursionError):  # it can be parsed, but not compiled
        return code
    kept: set[ast.stmt] = {node for node in tree.body if isinstance(node, DEFINITIONS)}
    defined = set[str]().union(*(names[node].assigned for node in kept if not isinstance(node, ast.Import)))
    effects: dict[str, set[str]] = {
        node.name: names[node].assigned | names[node].changed for node in tree.body if isinstance(node, FUNCTIONS)
    }
    by_definitions = {entry_point}.union(*(names[node].read for node in kept))
    reached, before = {entry_point}, (0, 0)
    while before != (before := (len(reached), len(kept))):
        used = set(by_definitions)
        # From the end: a statement uses names that earlier ones define.
        for node in reversed(tree.body):
            name = names[node]
            changed = (name.changed - defined).union(*(effects.get(g, set()) - {g} for g in name.called))
            is_trial = isinstance(node, ast.Assert) or (isinstance(node, ast.Expr) and entry_point in name.called)
            is_setup = name.sets_up and isinstance(node, ast.Expr)
            if not is_trial and (name.assigned & used or changed & reached or is_setup):
                kept.add(node)
            if node in kept:
                used |= name.read
                reached |= name.read if (name.assigned | changed) & reached else set()
    numbers: set[int] = set()
    for node in kept:
        decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
        numbers |= set(range(min([node.lineno, *decorators]), (node.end_lineno or node.lineno) + 1))
    return "\n".join(line for number, line in enumerate(code.split("\n"), 1) if number in numbers)


def _root(node: ast.expr) -> set[str]:
    """`{"a"}` of `a.b[0].c`."""
    while isinstance(node, (ast.Subscript, ast.Attribute)):
        node = node.value
    return {node.id} if isinstance(node, ast.Name) else set()
