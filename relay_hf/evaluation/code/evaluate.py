"""An evaluation on code: every problem is answered and checked at every threshold; an interrupted run resumes."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ...modeling import RelayForMaskedDiffusion
from ..weights import hash_weights
from .answers import Answerer, check_thresholds
from .arguments import CodeEvalArguments
from .extraction import extract_code
from .problems import Problem, fingerprint, load_problems
from .report import CodeResult, summarize, write_report
from .samples import (
    SETTINGS,
    Sample,
    append_samples,
    finish_samples,
    read_settings,
    resume_samples,
    samples_file,
)
from .sandbox import Limits, Outcome, check_platform, run_program

# What may differ between a run and its continuation.
NOT_SETTINGS = {"output_dir", "thresholds", "device"}


def evaluate_code(
    model: RelayForMaskedDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    arguments: CodeEvalArguments,
    name: str = "model",
) -> list[CodeResult]:
    """Evaluates a model, and writes answers, `results.json` and a picture to `arguments.output_dir`.

    Called again with the same arguments it goes on where it stopped. Thresholds may be added; the report is on those
    that are named, and earlier answers are only read.

    Args:
        model: a model in evaluation mode.
        tokenizer: its tokenizer, with a chat template.
        arguments: what to evaluate; `device` and `dtype` are ignored, because the model is loaded already.
        name: the model's name in tables and pictures.

    Returns:
        One result per threshold, in the order given.

    Raises:
        ImportError, OSError: the benchmark, the sandbox or the folder is missing.
        ValueError: model, options or problems do not fit each other, or the folder holds another evaluation.
    """
    check_platform()
    problems = load_problems(arguments.benchmark)[: arguments.limit]
    answerer = Answerer(
        model, tokenizer, arguments.max_new_tokens, arguments.stop_at_fence, arguments.options, arguments.chat_prompt
    )
    thresholds = check_thresholds(model.config, model.generation_config, answerer.options, arguments.thresholds)
    answerer.check_lengths(problems)
    settings = {
        "model": name,
        "weights": hash_weights(model),
        "problems": fingerprint(problems),
        **{key: value for key, value in asdict(arguments).items() if key not in NOT_SETTINGS},
        "dtype": str(model.dtype),
    }
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _enter(folder, settings)
        results = []
        for threshold in thresholds:
            samples = _complete(folder / samples_file(threshold), answerer, problems, threshold, arguments)
            results.append(summarize(samples, name, threshold))
        write_report(results, settings, folder)
    return results


def check_solutions(problems: Sequence[Problem], solutions: Sequence[str], limits: Limits) -> list[Outcome]:
    """Runs each solution with its problem's tests, as many at once as there are processor cores."""
    programs = [problem.program(solution) for problem, solution in zip(problems, solutions, strict=True)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda program: run_program(program, limits), programs))


def _complete(
    path: Path, answerer: Answerer, problems: Sequence[Problem], threshold: float, arguments: CodeEvalArguments
) -> list[Sample]:
    """Answers what the file at `path` does not answer yet, the longest first; returns all answers."""
    samples = resume_samples(path, problems, arguments.batch_size)
    answered = {sample.task_id for sample in samples}
    left = [problem for problem in answerer.longest_first(problems) if problem.task_id not in answered]
    with tqdm(total=len(problems), initial=len(samples), desc=f"threshold {threshold:g}", unit="problem") as bar:
        for begin in range(0, len(left), arguments.batch_size):
            batch = left[begin : begin + arguments.batch_size]
            checked = _answer_and_check(answerer, batch, threshold, arguments.limits)
            append_samples(path, checked)
            samples += checked
            bar.update(len(batch))
            bar.set_postfix(passed=sum(sample.passed for sample in samples))
    return finish_samples(path, samples, problems)


def _answer_and_check(
    answerer: Answerer, problems: Sequence[Problem], threshold: float, limits: Limits
) -> list[Sample]:
    answers = answerer(problems, threshold)
    solutions = [
        extract_code(answer.text, problem.entry_point, problem.given)
        for problem, answer in zip(problems, answers, strict=True)
    ]
    outcomes = check_solutions(problems, solutions, limits)
    samples = []
    for problem, answer, solution, outcome in zip(problems, answers, solutions, outcomes, strict=True):
        costs = asdict(answer)
        samples.append(Sample(problem.task_id, solution, costs.pop("text"), **asdict(outcome), **costs))
    return samples


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder: their answers would end up in the same files."""
    import fcntl  # not on every platform

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"Another run writes to `{folder}`: let it end, or give another `--output_dir`."
            raise ValueError(message) from error
        yield
    finally:
        os.close(descriptor)


def _enter(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings, or checks that the answers in the folder are of these."""
    path = folder / SETTINGS
    if not path.exists() or not any(folder.glob("samples_*.jsonl")):
        path.write_text(json.dumps(settings, indent=2) + "\n")
        return
    earlier = read_settings(folder)
    if other := [key for key in settings if settings[key] != earlier.get(key)]:
        differences = ", ".join(f"{key}: {earlier.get(key)!r}, now {settings[key]!r}" for key in other)
        raise ValueError(f"`{folder}` holds another evaluation ({differences}): give another `--output_dir`.")
