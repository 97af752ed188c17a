"""Small files in the columns of both data sets; every filter has a row that only it leaves out."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from relay_hf.cli import main
from relay_hf.commands.mixture_filters import prompt_key

from .conftest import write_rows


def code_row(prompt: str = "write f", **changes: Any) -> dict[str, Any]:
    """A good row of OpenCodeInstruct, which keeps everything as text."""
    row = {
        "id": "0",
        "input": prompt,
        "output": "def f(): pass",
        "domain": "generic",
        "unit_tests": '["assert f() is None", "assert f"]',
        "tests_execution_status": '["pass", "pass"]',
        "average_test_score": "1",
    }
    return {**row, **changes}


def math_row(prompt: str = "1 + 1?", **changes: Any) -> dict[str, Any]:
    """A good row of OpenMathInstruct-2."""
    row = {"problem": prompt, "generated_solution": "It is 2.", "expected_answer": "2", "problem_source": "gsm8k"}
    return {**row, **changes}


BAD_CODE = [
    ("empty prompt or answer", code_row(" ")),
    ("empty prompt or answer", code_row("a", output=None)),
    ("defines no function", code_row("b", output="lambda: None")),
    ("no unit tests", code_row("c", unit_tests="[]")),
    ("no unit tests", code_row("c2", unit_tests="")),
    ("test score below 1", code_row("d", average_test_score="0.9")),
    ("test score below 1", code_row("e", average_test_score=None)),
    ("a test fails", code_row("f", tests_execution_status='["pass", "fail"]')),
    ("names a benchmark", code_row("as in HumanEval")),
    ("names a benchmark", code_row("g", output="def f(): return 'MBPP'")),
    ("prompt seen before", code_row("  Write\n F ")),
    ("too many tokens", code_row("h", output="def f(): " + "x" * 200)),
]
BAD_MATH = [
    ("empty prompt or answer", math_row("", generated_solution="2")),
    ("problem too long", math_row("x" * 4001)),
    ("solution too long", math_row("i", generated_solution="x" * 6001)),
    ("names a benchmark", math_row("of MATH-500")),
    ("prompt seen before", math_row("WRITE f")),  # a prompt of the other data set
    ("too many tokens", math_row("j", generated_solution="x" * 200)),
]


@pytest.fixture
def prepare(checkpoint: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs the command on rows of code and of mathematics."""

    def run(
        code: list[dict], math: list[dict], *options: Any, output: str = "data/out.jsonl", max_tokens: int = 100
    ) -> int:
        code_file, math_file = write_rows(tmp_path / "code.jsonl", code), write_rows(tmp_path / "math.jsonl", math)
        arguments = ["--code", code_file, "--math", math_file, "--model", checkpoint, "--max_tokens", max_tokens]
        return main(["prepare-data", *map(str, (tmp_path / output, *arguments, *options))])

    return run


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_conversational_prompt_and_completion(prepare: Callable[..., int], tmp_path: Path) -> None:
    assert prepare([code_row()], [math_row()], "--code_rows", 1, "--math_rows", 1) == 0
    rows = {row["source"]: row for row in read(tmp_path / "data" / "out.jsonl")}
    assert rows["code"]["prompt"] == [{"role": "user", "content": "write f"}]
    assert rows["code"]["completion"] == [{"role": "assistant", "content": "def f(): pass"}]
    assert rows["math"]["prompt"] == [{"role": "user", "content": "1 + 1?"}]
    assert rows["math"]["completion"] == [{"role": "assistant", "content": "It is 2."}]


@pytest.mark.parametrize(("reason", "row"), BAD_CODE)
def test_code_filter_drops_its_row_and_counts_it(
    reason: str, row: dict, prepare: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    # A buffer of one keeps the order of the file.
    assert prepare([code_row(), row, code_row("good")], [], "--code_rows", 2, "--math_rows", 0, "--code_buffer", 1) == 0
    assert len(read(tmp_path / "data" / "out.jsonl")) == 2
    assert f"code: 3 read, 2 kept; left out: 1 {reason}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("reason", "row"), BAD_MATH)
def test_math_filter_drops_its_row_and_counts_it(
    reason: str, row: dict, prepare: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    # Only the length in tokens must be short, where it is what is looked at.
    limit = 100 if reason == "too many tokens" else 10_000
    options = ("--code_rows", 1, "--math_rows", 2, "--math_buffer", 1)
    assert prepare([code_row()], [math_row(), row, math_row("good")], *options, max_tokens=limit) == 0
    assert f"math: 3 read, 2 kept; left out: 1 {reason}\n" in capsys.readouterr().out


def test_limits_themselves_are_kept(prepare: Callable[..., int], checkpoint: Path) -> None:
    at_limit = [math_row("x" * 4000, generated_solution="y" * 6000)]
    tokens = len(
        AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(
            [{"role": "user", "content": "x" * 4000}, {"role": "assistant", "content": "y" * 6000}]
        )["input_ids"]
    )
    options = ("--code_rows", 0, "--math_rows", 1)
    assert prepare([code_row()], at_limit, *options, max_tokens=tokens) == 0
    assert prepare([code_row()], at_limit, *options, max_tokens=tokens - 1, output="less.jsonl") == 2


@pytest.mark.parametrize("status", ["", None, ["pass"], "['pass', 'pass']"])
def test_results_in_other_forms_are_read(status: Any, prepare: Callable[..., int]) -> None:
    row = code_row(tests_execution_status=status, average_test_score=1.0)
    assert prepare([row], [], "--code_rows", 1, "--math_rows", 0) == 0


def test_same_arguments_give_the_same_file_and_another_seed_another(
    prepare: Callable[..., int], tmp_path: Path
) -> None:
    code, math = [code_row(f"c{i}") for i in range(20)], [math_row(f"m{i}") for i in range(20)]
    options = ("--code_rows", 8, "--math_rows", 12)
    for output, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert prepare(code, math, *options, "--seed", seed, output=output) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(map(str, read(tmp_path / "a"))) != sorted(map(str, read(tmp_path / "c")))
    assert [row["source"] for row in read(tmp_path / "a")] != ["code"] * 8 + ["math"] * 12


def test_prompt_key_is_sha1_of_what_is_left_without_case_and_space() -> None:
    assert prompt_key(" A\n\tb  C ") == hashlib.sha1(b"a b c").hexdigest()


@pytest.mark.parametrize(
    ("code", "options", "message"),
    [
        ([code_row()], ["--code_rows", 2], "has 1 rows that can be kept, but 2 are wanted (1 read, 1 kept"),
        ([{"input": "a"}], [], "has no rows with ['average_test_score', 'output'"),
        ([], [], "has no rows with"),
        ([code_row()], ["--code_rows", -1], "`--code_rows=-1` must be at least 0"),
        ([code_row()], ["--max_tokens", 0], "`--max_tokens=0` must be at least 1"),
        ([code_row()], ["--math", "nowhere.jsonl", "--code_rows", 1], "`nowhere.jsonl` does not exist"),
        ([code_row()], ["--model", "nobody/nothing"], "`nobody/nothing` is not a model"),
        ([code_row()], ["--magic", 1], "--magic"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_leaves_no_file(
    code: list, options: list, message: str, prepare: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert prepare(code, [math_row()], "--math_rows", 1, *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("data/*"))


def test_output_is_never_overwritten(
    prepare: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mine").write_text("precious")
    assert prepare([code_row()], [math_row()], output="mine") == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "precious"
