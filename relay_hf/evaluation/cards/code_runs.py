"""Evaluations on code into the card of the model that was evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...hub_cards import DatasetFacts, Evaluation, EvaluationRow, add_evaluation, slug
from ..code.compare import describe_accuracy, differing_settings, pair_samples
from ..code.report import RESULTS, CodeResult, draw_picture, read_results
from ..code.samples import read_samples, samples_file
from .evaluated import ensure_card, load_evaluated, row_of_threshold

# Benchmarks that are on the Hub; of files only the name is known.
DATASETS = {"humaneval": DatasetFacts("HumanEval", hub_id="openai/openai_humaneval", split="test")}

# Settings that show whether a run evaluated this model, on the same problems as another.
NEEDED = {"model", "weights", "problems", "dtype"}


@dataclass(frozen=True)
class _Run:
    """An output folder of `relay-hf eval`, under the name that the card gives it."""

    folder: Path
    label: str
    settings: dict[str, Any]
    results: list[CodeResult]

    @property
    def rows(self) -> list[EvaluationRow]:
        return [replace(result.row, label=self.label) for result in self.results]


def add_runs(folder: Path, runs: Sequence[Path]) -> Path:
    """Writes evaluations into the card of a model, with a picture.

    A folder without card, or with an empty form, gets a plain one.

    Args:
        folder: the folder of the model.
        runs: output folders of `relay-hf eval`: that of this model, then those that it is compared with.

    Returns:
        The path of the card.

    Raises:
        OSError: a folder or its results do not exist.
        ValueError: the first run evaluated other weights, or the runs answered different problems.
    """
    own, *others = _read_runs(runs)
    model: Any = load_evaluated(folder, own.settings["weights"], own.settings["dtype"], own.folder)
    if strangers := [run for run in others if run.settings["problems"] != own.settings["problems"]]:
        raise ValueError(
            f"`{strangers[0].folder}` and `{own.folder}` answered different problems: compare runs of one benchmark, "
            "with the same `--limit`."
        )
    dataset = _dataset(own.settings)
    picture = f"evaluation-{slug(dataset.name)}.png"  # `training.png` is another
    evaluation = Evaluation(
        dataset,
        rows=[row for run in (own, *others) for row in run.rows],
        highlighted=row_of_threshold(own.rows, model.generation_config.unmasking_threshold),
        unit="problem",
        picture=picture,
        comment="\n\n".join([_describe_protocol(own), *(_compare(own, other) for other in others)]),
    )
    draw_picture({run.label: run.results for run in (own, *others)}, folder / picture, dataset.name)
    ensure_card(folder)
    return add_evaluation(folder, evaluation)


def _dataset(settings: dict[str, Any]) -> DatasetFacts:
    benchmark = str(settings["benchmark"])
    dataset = DATASETS.get(benchmark, DatasetFacts(Path(benchmark.removesuffix(".gz")).stem))
    if settings["limit"] is None:
        return dataset
    # A part is not the benchmark, nor may the Hub take it for that.
    return DatasetFacts(f"{dataset.name}, first {settings['limit']} problems", split=dataset.split)


def _read_runs(folders: Sequence[Path]) -> list[_Run]:
    read = [read_results(folder) for folder in folders]
    for folder, (settings, results) in zip(folders, read, strict=True):
        if not results or NEEDED - set(settings):
            raise ValueError(f"`{folder / RESULTS}` is of another version or empty: run `relay-hf eval` again.")
    models = [settings["model"] for settings, _ in read]
    labels = [
        model if models.count(model) == 1 else f"{model} ({folder.resolve().name})"
        for model, folder in zip(models, folders, strict=True)
    ]
    if len(set(labels)) < len(labels):
        raise ValueError(f"Two runs are called `{max(labels, key=labels.count)}`: rename the folder of one of them.")
    return [_Run(*run) for run in zip(folders, labels, *zip(*read, strict=True), strict=True)]


def _describe_protocol(run: _Run) -> str:
    settings = run.settings
    end = ", the stop token or the end of the first code block" if settings["stop_at_fence"] else " or the stop token"
    options = (
        "" if settings["generation_options"] == "{}" else f" Decoding options: `{settings['generation_options']}`."
    )
    return (
        f"One greedy answer per problem, up to {settings['max_new_tokens']:,} tokens{end}; programs "
        f"ran for at most {settings['time_limit']:g} s. Made by `relay-hf eval`, batch size {settings['batch_size']}, "
        f"{settings['dtype'].removeprefix('torch.')}.{options}"
    )


def _compare(own: _Run, other: _Run) -> str:
    """What chance explains of the difference, at every threshold that both ran."""
    shared = [row.threshold for row in own.rows if row.threshold in {result.row.threshold for result in other.results}]
    lines = []
    for threshold in shared:
        files = [run.folder / samples_file(threshold) for run in (other, own)]
        pairs = pair_samples(*map(read_samples, files))
        verdict = describe_accuracy(pairs["passed"], other.label, own.label).replace("\n", " ")
        lines.append(f"- threshold {threshold:g}: {verdict}")
    if not lines:
        return f"{other.label} was not run at the same thresholds: read the curves up and down."
    note = differing_settings(own.folder, other.folder)
    return "\n".join([f"Problem by problem against {other.label}:", "", *lines, *([f"- {note}"] if note else [])])
