"""The program in an answer."""

import ast
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_hf.evaluation.code.extraction import _run_from, extract_code
from relay_hf.evaluation.code.needed import parse_python

FUNCTION = "def f(x):\n    return x + 1"
# Lines that answers are made of, wherever they stand.
LINES = st.sampled_from(
    ["```", "```python", "def f(x):", "    return x", "print(f(1))", "A = 1", "Sure!", "", "import os", "\t'''", "é\f("]
)


ANSWERS = {
    "loop that fills a table": (
        "P = []\nfor i in range(2, 9):\n    if all(i % p for p in P):\n        P.append(i)\ndef f(x):\n"
        "    return x in P\n"
    ),
    "option of a module": (
        "import sys\nsys.setrecursionlimit(5000)\ndef f(x):\n    return sys.getrecursionlimit() == 5000\n"
    ),
    "method call": ("D = {}\nD.update({3: True})\ndef f(x):\n    return D[x]\n"),
    "fence in a docstring": ('def f(x):\n    """Example:\n    ```\n    f(3)\n    ```\n    """\n    return True\n```\n'),
    "indented block": ("  ```python\n  def f(x):\n      return True\n  ```\n"),
    "helper in its own block": ("def g(x):\n    return True\n```\nand\n```python\ndef f(x):\n    return g(x)\n```\n"),
    "function that fills a table": (
        "T = []\ndef build():\n    for i in range(5): T.append(i)\nbuild()\ndef f(x):\n    return x in T\n"
    ),
    "function that assigns a global": (
        "def build():\n    global T\n    T = [3]\nT = []\nbuild()\ndef f(x):\n    return x in T\n"
    ),
    "function given the table": ("T = []\ndef build(t):\n    t.append(3)\nbuild(T)\ndef f(x):\n    return x in T\n"),
    "module's function given the table": ("import heapq\nT = [9,3]\nheapq.heapify(T)\ndef f(x):\n    return T[0]==3\n"),
    "prose around code without fences": ("Here is it:\ndef f(x):\n    return True\nThat is all."),
    "tildes": ("~~~python\ndef f(x):\n    return True\n~~~\n"),
    "question repeated": (
        'def f(x):\n    """Doc."""\n```\nNow:\n```python\ndef f(x):\n    """Doc."""\n    return True\n```'
    ),
    "unit test that ends the program": (
        "import unittest\ndef f(x):\n    return True\nclass T(unittest.TestCase):\n    def test(self):\n"
        "        self.assertTrue(f(3))\nunittest.main()\n"
    ),
    "script that ends the program": (
        "import sys\ndef f(x):\n    return sys.maxsize>1\ndef main():\n    input()\n    print(f(3))\n"
        "main()\nsys.exit(1)\n"
    ),
    "limit set": (
        "import sys\nsys.setrecursionlimit(6000)\ndef f(x):\n    import sys as s\n"
        "    return s.getrecursionlimit()==6000"
    ),
    "helpers in later blocks": (
        "def f(x):\n    return g(x)\n```\nwith\n```python\ndef g(x):\n    return h\n```\n```\nh = True\n```"
    ),
    "block never closed": ("def f(x):\n    return True\n\n```python\nprint(f(3)"),
    "everything indented": ("    def f(x):\n        return True\n"),
    "part of an object": (
        "class C:\n    def __init__(self):\n        self.d={}\nc=C()\nc.d[3]=True\ndef f(x): return c.d[x]"
    ),
    "fence of four": ('````python\ndef f(x):\n    """\n```\nq\n```\n"""\n    return True\n````\n'),
    "table filled in try": ("T={}\ntry:\n    T.update({3:True})\nfinally:\n    pass\ndef f(x): return T[x]"),
    "method of a helper": (
        "from functools import lru_cache\n@lru_cache(None)\ndef g(x):\n    return True\n"
        "def f(x): return g(x)\ng.cache_clear()\nprint(f(1))"
    ),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_right_answer_gives_a_program_that_is_right(kind: str) -> None:
    names: dict = {}
    exec(extract_code(ANSWERS[kind], "f"), names)
    assert names["f"](3) is True


@pytest.mark.parametrize(
    "answer",
    [
        FUNCTION,
        f"{FUNCTION}\n```\nIt adds one.",
        f"{FUNCTION}\r\n```",
        f"Sure, here it is:\n```python\n{FUNCTION}\n```",
        f"```python\n{FUNCTION}\n```\nTry it:\n```python\nprint(f(1))\n```",
        f"def helper(): pass\n```\nand\n```Python 3\n{FUNCTION}\n```",
        f"def f(x:\n```\nNo, I mean\n```\n{FUNCTION}\n```",
        f"{FUNCTION}\n\nprint(f(3))\nassert f(1) == 3\nif __name__ == '__main__':\n    f(0)",
        f"n = int(input())\n{FUNCTION}\nresult = f(n)",
        # Names of a trial that are those of a local variable.
        f"x = int(input())\n{FUNCTION}",
        "def f(x):\n    result = x + 1\n    return result\nresult = f(int(input()))\nfor result in 1, 2:\n    input()",
        f"{FUNCTION}\n\ndef unfinished(x):\n    return (x",
        f"{FUNCTION}\nThis function adds one.",
    ],
)
def test_answer_gives_the_function(answer: str) -> None:
    names: dict = {}
    exec(extract_code(answer, "f"), names)
    assert names["f"](1) == 2
    assert "print" not in extract_code(answer, "f")


def test_what_the_function_needs_is_kept_with_its_comments() -> None:
    code = (
        "import math\nBASE = 2\nTABLE: list = [BASE]\nf = lambda x: TABLE[x]\n@staticmethod\n# why\ndef g(): return f"
    )
    assert extract_code(f"{code}\nOTHER = g()", "f") == code


@pytest.mark.parametrize(
    "code",
    [
        "T = [0] * 9\nT[1] = 1\nfor i in range(2, 9):\n    T[i] = T[i - 1] + 1\ndef f(x): return T[x + 1]",
        "try:\n    from nowhere import add\nexcept ImportError:\n    add = int.__add__\ndef f(x): return add(x, 1)",
        "SUM = 0\nSUM += 1\ndef f(x): return x + SUM",
        "f = lambda x: x + 1",
    ],
)
def test_statements_that_the_function_needs_are_kept(code: str) -> None:
    assert extract_code(f"{code}\nprint(f(0))\nfor i in range(3):\n    print(f(i))", "f") == code
    names: dict = {}
    exec(code, names)
    assert names["f"](1) == 2


def test_future_import_stays_first() -> None:
    code = extract_code("from __future__ import annotations\ndef f(x: Missing): return x", "f", "import math")
    names: dict = {}
    exec(compile(code, "", "exec", dont_inherit=True), names)
    assert names["f"](names["math"]) is names["math"]


@given(st.lists(LINES, max_size=8))
def test_cut_is_the_longest_that_parses(lines: list[str]) -> None:
    runs = ["\n".join(lines[:end]) for end in range(len(lines), 0, -1)]
    parsed = [(run, parse_python(run)) for run in runs]
    longest, tree = next((pair for pair in parsed if isinstance(pair[1], ast.Module)), ("", None))
    assert _run_from(lines) == (longest if tree and tree.body else None)


def test_long_answer_that_breaks_off_takes_no_time() -> None:
    answer = "def f(x):\n    return x\n" + "x = [\n" * 4000
    began = time.monotonic()
    assert extract_code(answer, "f") == "def f(x):\n    return x"
    assert time.monotonic() - began < 5


def test_question_comes_first_and_the_answer_may_redefine_it() -> None:
    code = extract_code(
        "def helper(): return 2\ndef f(): return helper()", "f", "from math import pi\ndef helper(): return 1"
    )
    names: dict = {}
    exec(code, names)
    assert names["f"]() == 2
    assert "pi" in names


@pytest.mark.parametrize("answer", ["", "I cannot do that.", "```", "x = '\0'", "(" * 1000, "\ud800"])
def test_answer_without_a_program_is_returned_as_it_is(answer: str) -> None:
    assert extract_code(answer, "f") == ("" if answer == "```" else answer)


@given(st.lists(LINES, max_size=12).map("\n".join))
def test_any_answer_gives_a_part_of_itself_and_again_the_same(answer: str) -> None:
    code = extract_code(answer, "f")
    assert {line.strip() for line in code.split("\n")} <= {*map(str.strip, answer.split("\n")), ""}
    assert extract_code(code, "f") == code


@given(st.text())
def test_no_text_raises(text: str) -> None:
    extract_code(text, "f")


@given(st.lists(st.sampled_from(["print(1)", "y = f(2)", "assert f", "import os", "Z = 1"])), st.text(max_size=40))
def test_function_survives_what_stands_around_it(around: list[str], prose: str) -> None:
    answer = "\n".join([*around, FUNCTION, *around, "```", prose])
    functions = [node for node in ast.parse(extract_code(answer, "f")).body if isinstance(node, ast.FunctionDef)]
    assert [ast.unparse(node) for node in functions] == [FUNCTION]
