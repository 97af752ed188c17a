"""The file of answers: one JSON line per problem, which EvalPlus reads as well, and which a killed run resumes from."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .problems import Problem

SETTINGS = "settings.json"  # beside the files of answers


@dataclass(frozen=True)
class Sample:
    """One problem, answered and checked.

    Args:
        task_id, solution: the problem's name and the whole program; EvalPlus reads these two.
        answer: the text of the model.
        passed, reason: as in `Outcome`.
        denoise_forwards, commit_forwards, prefill_forwards: as `RelayGenerateOutput` counts them for the row.
        new_tokens: tokens that were written, the stop token included.
    """

    task_id: str
    solution: str
    answer: str
    passed: bool
    reason: str
    denoise_forwards: int
    commit_forwards: int
    prefill_forwards: int
    new_tokens: int


def samples_file(threshold: float) -> str:
    """Name of the file with the answers at a threshold, in all its digits: two thresholds are never one file."""
    return f"samples_threshold_{str(threshold).removesuffix('.0')}.jsonl"


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of an evaluation.

    Raises:
        OSError: the folder has no settings.
        ValueError: the file holds no settings.
    """
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"`{path}` is no JSON ({error}): give an output folder of `relay-hf eval`.") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"`{path}` holds a {type(settings).__name__}, not names and values: give an output folder of "
            "`relay-hf eval`."
        )
    return settings


def read_samples(path: Path) -> list[Sample]:
    """Reads a file of answers.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no file of answers, or not complete.
    """
    return [_read_line(line, path) for line in path.read_bytes().splitlines()]


def append_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Writes answers behind those of the file, to the disk."""
    with path.open("ab") as file:
        file.write("".join(json.dumps(asdict(sample)) + "\n" for sample in samples).encode())
        file.flush()
        os.fsync(file.fileno())


def resume_samples(path: Path, problems: Sequence[Problem], batch_size: int) -> list[Sample]:
    """The answers of an earlier run, which the file is cut back to.

    Only whole batches are kept. So the rest runs in the batches that it would have run in, and the file of a run that
    was interrupted is that of one that was not.

    Raises:
        ValueError: the file answers another problem than these, or one of them twice.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    if len(lines) < len(problems):
        lines = lines[: len(lines) // batch_size * batch_size]
    samples = [_read_line(line, path) for line in lines]
    answered = {sample.task_id for sample in samples}
    if len(answered) < len(samples) or not answered <= {problem.task_id for problem in problems}:
        raise ValueError(f"`{path}` answers other problems than these: give another `--output_dir`.")
    os.truncate(path, sum(map(len, lines)))
    return samples


def finish_samples(path: Path, samples: Sequence[Sample], problems: Sequence[Problem]) -> list[Sample]:
    """Writes the answers to all problems once more, in the order of the problems, and returns them so."""
    by_name = {sample.task_id: sample for sample in samples}
    in_order = [by_name[problem.task_id] for problem in problems]
    whole = path.with_name(f"{path.name}.whole")
    whole.unlink(missing_ok=True)
    append_samples(whole, in_order)
    whole.replace(path)  # at no time is there a part of it only
    return in_order


def _read_line(line: bytes, path: Path) -> Sample:
    try:
        record = json.loads(line)
        return Sample(**{field.name: record[field.name] for field in fields(Sample)})
    except KeyError as error:
        raise ValueError(f"`{path}` has a line without {error}: give a file of answers of `relay-hf eval`.") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{path}` has a line that is no answer ({error}): give a file of `relay-hf eval`.") from error
