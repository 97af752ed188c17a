"""Which rows of OpenCodeInstruct and OpenMathInstruct-2 the published mixture leaves out; pure functions of a row."""

import ast
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Names of benchmarks: a row with one may be a problem that the model is later asked.
MARKERS = ("humaneval", "human_eval", "mbpp", "evalplus", "math-500", "math500")
MAX_PROBLEM_CHARACTERS, MAX_SOLUTION_CHARACTERS = 4000, 6000


@dataclass(frozen=True)
class Source:
    """One of the two data sets.

    Args:
        prompt, answer: its columns.
        others: more columns that the filter reads.
        defect: the reason to leave out a row, given its prompt and answer; None for a good row.
    """

    prompt: str
    answer: str
    others: tuple[str, ...]
    defect: Callable[[Mapping[str, Any], str, str], str | None]

    def read(self, row: Mapping[str, Any]) -> tuple[str, str, str | None]:
        """Prompt, answer, and why the row is left out, if it is."""
        prompt, answer = (str(row[name] or "").strip() for name in (self.prompt, self.answer))
        if not prompt or not answer:
            return prompt, answer, "empty prompt or answer"
        reason = self.defect(row, prompt, answer)
        if reason is None and any(marker in f"{prompt}\n{answer}".lower() for marker in MARKERS):
            reason = "names a benchmark"
        return prompt, answer, reason


def prompt_key(prompt: str) -> str:
    """The same for prompts that differ in case and white space only."""
    return hashlib.sha1(" ".join(prompt.lower().split()).encode()).hexdigest()


def _code_defect(row: Mapping[str, Any], prompt: str, answer: str) -> str | None:
    if "def " not in answer:
        return "defines no function"
    if not _as_list(row["unit_tests"]):
        return "no unit tests"
    if _as_number(row["average_test_score"]) < 1:
        return "test score below 1"
    # A perfect score without single results is believed, as published.
    if any(str(status).lower() != "pass" for status in _as_list(row["tests_execution_status"])):
        return "a test fails"
    return None


def _math_defect(row: Mapping[str, Any], prompt: str, answer: str) -> str | None:
    if len(prompt) > MAX_PROBLEM_CHARACTERS:
        return "problem too long"
    if len(answer) > MAX_SOLUTION_CHARACTERS:
        return "solution too long"
    return None


def _as_list(value: Any) -> list[Any]:
    """A list that the data set may hold as text; text that is no list is its only element."""
    if not isinstance(value, str):
        return list(value or [])
    try:
        parsed = ast.literal_eval(value.strip()) if value.strip() else []
    except (SyntaxError, ValueError):
        return [value]
    return parsed if isinstance(parsed, list) else [parsed]


def _as_number(value: Any) -> float:
    """A number that the data set holds as text; 0 if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


CODE = Source("input", "output", ("unit_tests", "average_test_score", "tests_execution_status"), _code_defect)
MATH = Source("problem", "generated_solution", (), _math_defect)
