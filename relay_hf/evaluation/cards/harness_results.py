"""Results of lm-evaluation-harness into the card of the model that was evaluated."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...hub_cards import DatasetFacts, Evaluation, EvaluationRow, add_evaluation, is_hub_id
from ..forwards import FORWARDS
from .evaluated import ensure_card, load_evaluated, row_of_threshold

# What is read of a file; the model `relay` writes the second.
NEEDED = {
    "config", "configs", "lm_eval_version", "model_name", "n-samples", "n-shot", "results", "task_hashes", "versions",
}  # fmt: skip
NEEDED_OF_CONFIG = {"generation_forwards", "generation_options", "model_dtype", "weights"}


@dataclass(frozen=True)
class _Results:
    """A file of results, as `python -m relay_hf.evaluation --output_path` writes it."""

    path: Path
    content: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.content["config"]

    @property
    def tasks(self) -> list[str]:
        """Tasks that generate text; log-likelihood tasks have no forward counts."""
        return list(self.config["generation_forwards"])

    def options(self, task: str) -> dict[str, Any]:
        """Of decoding, the threshold among them; a task's own go before those of the model."""
        own = self.content["configs"][task].get("generation_kwargs") or {}
        return {name: own.get(name, value) for name, value in self.config["generation_options"].items()}

    def metrics(self, task: str) -> dict[str, float]:
        """Fractions, without their standard errors; `strict-match` and the like stay with the name."""
        found = {}
        for name, value in self.content["results"][task].items():
            metric, _, rule = name.partition(",")
            if rule and not metric.endswith("_stderr") and isinstance(value, float) and 0 <= value <= 1:
                found[metric if rule == "none" else f"{metric} ({rule})"] = value
        return found


def add_results(folder: Path, files: Sequence[Path]) -> Path:
    """Writes results of the harness into the card of a model; a folder without card gets a plain one.

    Args:
        folder: the folder of the model.
        files: `results_*.json` of this model; then others of it at other thresholds, or of models that it is compared
            with, which enter where they ran the same task.

    Returns:
        The path of the card.

    Raises:
        OSError: a file or the model does not exist.
        ValueError: the first file is about other weights, has no task that generates text, or holds no such results.
    """
    own, *others = (_read(path) for path in files)
    model: Any = load_evaluated(folder, own.config["weights"], own.config["model_dtype"], own.path)
    if not own.tasks:
        raise ValueError(f"`{own.path}` has no task in which the model wrote text: forwards were not counted.")
    threshold = model.generation_config.unmasking_threshold
    evaluations = [_evaluation(task, [own, *others], threshold) for task in own.tasks]
    ensure_card(folder)
    return [add_evaluation(folder, evaluation) for evaluation in evaluations][-1]


def _read(path: Path) -> _Results:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = sorted(NEEDED - set(content) | NEEDED_OF_CONFIG - set(content.get("config", {})))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"`{path}` holds no JSON object ({error}): give a `results_*.json` of the harness.") from error
    if missing:
        raise ValueError(
            f"`{path}` holds no results of `python -m relay_hf.evaluation`, or of another version (it lacks "
            f"{missing}): give a `results_*.json` of it."
        )
    return _Results(path, content)


def _evaluation(task: str, files: Sequence[_Results], own_threshold: float) -> Evaluation:
    own, *others = files
    same_task = [own]
    for other in others:
        if task in other.tasks:
            if other.content["task_hashes"].get(task) != own.content["task_hashes"].get(task):
                raise ValueError(
                    f"`{own.path}` and `{other.path}` hold different questions of `{task}`: compare runs of one "
                    "version of the task."
                )
            same_task.append(other)
    rows = [_row(task, results, label) for results, label in zip(same_task, _labels(task, same_task), strict=True)]
    own_rows = [row for row in rows if row.label == rows[0].label]
    return Evaluation(
        _dataset(task, own),
        rows=rows,
        highlighted=row_of_threshold(own_rows, own_threshold),
        unit="problem",
        comment=_describe_protocol(task, own),
    )


def _labels(task: str, files: Sequence[_Results]) -> list[str]:
    """Names of models, one each: the same weights at other thresholds are the same model, with other options not."""
    labels = []
    known: dict[str, dict[str, Any]] = {}
    for results in files:
        facts = {**results.options(task), "unmasking_threshold": None, "weights": results.config["weights"]}
        label = Path(results.content["model_name"]).name
        if known.setdefault(label, facts) != facts:
            label = f"{label} ({results.path.stem})"
        labels.append(label)
    return labels


def _row(task: str, results: _Results, label: str) -> EvaluationRow:
    costs = results.config["generation_forwards"][task]
    return EvaluationRow(
        label=label,
        metrics=results.metrics(task),
        **{kind: costs[kind] for kind in FORWARDS},
        samples=results.content["n-samples"][task]["effective"],
        threshold=results.options(task)["unmasking_threshold"],
    )


def _dataset(task: str, results: _Results) -> DatasetFacts:
    asked, count = results.content["configs"][task], results.content["n-samples"][task]
    source = str(asked.get("dataset_path"))
    if count["effective"] < count["original"]:
        # A part is not the benchmark, nor may the Hub take it for that.
        return DatasetFacts(f"{task}, {count['effective']} of {count['original']} problems")
    return DatasetFacts(
        task,
        hub_id=source if is_hub_id(source) else None,
        config=asked.get("dataset_name"),
        split=asked.get("test_split") or asked.get("validation_split"),
    )


def _describe_protocol(task: str, results: _Results) -> str:
    shots, version = results.content["n-shot"][task], results.content["versions"][task]
    asked = f"task `{task}`" + (f" version {version:g}" if isinstance(version, int | float) else "")
    errors = [
        f"{name.partition('_stderr')[0]} {100 * value:.1f}"
        for name, value in results.content["results"][task].items()
        if "_stderr," in name and isinstance(value, float)
    ]
    options = ", ".join(f"`{name}={value}`" for name, value in results.options(task).items() if value is not None)
    spread = f" Standard errors over the problems, in points: {', '.join(errors)}." if errors else ""
    return (
        f"Made by lm-evaluation-harness {results.content['lm_eval_version']}, {asked}, "
        f"{shots} example{'s' if shots != 1 else ''} in the prompt, {options}.{spread}"
    )
