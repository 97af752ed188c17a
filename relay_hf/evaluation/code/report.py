"""What an evaluation on code shows: a table, a JSON file and the picture of accuracy against forwards."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ...hub_cards import EvaluationRow, hardware, versions
from ...pictures.accuracy import CurvePoint, plot_accuracy_against_forwards
from ..forwards import FORWARDS
from .samples import Sample

METRIC = "pass@1"
RESULTS, PICTURE = "results.json", "accuracy_against_forwards.png"


@dataclass(frozen=True)
class CodeResult:
    """All problems at one threshold.

    Args:
        row: accuracy and mean forwards per problem, as model cards take it.
        new_tokens: mean per problem.
    """

    row: EvaluationRow
    new_tokens: float

    @property
    def accuracy(self) -> float:
        """pass@1 of one greedy answer per problem: the fraction that passed."""
        return self.row.metrics[METRIC]

    @property
    def forwards_per_token(self) -> dict[str, float]:
        """Forwards of each kind, divided by the tokens that all of them together wrote."""
        return {name: getattr(self.row, name) / max(self.new_tokens, 1e-9) for name in FORWARDS}


def summarize(samples: Sequence[Sample], label: str, threshold: float) -> CodeResult:
    """Means over the answers of one model at one threshold."""
    row = EvaluationRow(
        label=label,
        threshold=threshold,
        metrics={METRIC: mean(sample.passed for sample in samples)},
        **{name: mean(getattr(sample, name) for sample in samples) for name in FORWARDS},
        samples=len(samples),
    )
    return CodeResult(row, mean(sample.new_tokens for sample in samples))


def format_table(results: Sequence[CodeResult]) -> str:
    """The table for the terminal."""
    lines = [
        "                                forwards per problem         forwards per 100 tokens      tokens per",
        "threshold  pass@1   passed    denoise   commit  prefill    denoise   commit  prefill     problem",
    ]
    for result in results:
        per_problem = "".join(f"{getattr(result.row, name):9.1f}" for name in FORWARDS)
        per_token = "".join(f"{100 * value:9.2f}" for value in result.forwards_per_token.values())
        passed = f"{round(result.accuracy * result.row.samples)}/{result.row.samples}"
        lines.append(
            f"{result.row.threshold:9g}  {100 * result.accuracy:5.1f}%  {passed:>7}  {per_problem}  {per_token}  "
            f"{result.new_tokens:10.1f}"
        )
    return "\n".join(lines)


def write_report(results: Sequence[CodeResult], settings: dict[str, Any], folder: Path) -> None:
    """Writes `results.json` and the picture; `settings` are copied into the file."""
    report = {
        "settings": settings,
        "hardware": hardware(),
        "versions": versions(),
        "results": [{**asdict(result), "forwards_per_token": result.forwards_per_token} for result in results],
    }
    (folder / RESULTS).write_text(json.dumps(report, indent=2) + "\n")
    draw_picture({settings["model"]: results}, folder / PICTURE, str(settings["benchmark"]))


def read_results(folder: Path) -> tuple[dict[str, Any], list[CodeResult]]:
    """The settings and the results that `write_report` wrote.

    Raises:
        OSError: the folder has no results.
        ValueError: another program wrote the file.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"`{folder}` holds no `{RESULTS}`: give an output folder of a whole `relay-hf eval`.")
    try:
        report = json.loads(path.read_text())
        results = [CodeResult(EvaluationRow(**record["row"]), record["new_tokens"]) for record in report["results"]]
        return dict(report["settings"]), results
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`{path}` is not a result of `relay-hf eval` ({error!r}): give a folder of it.") from error


def draw_picture(curves: dict[str, Sequence[CodeResult]], path: Path, benchmark: str) -> None:
    """One curve per model, a point per threshold."""
    points = {
        label: [CurvePoint(result.row.threshold, result.row.denoise_forwards, result.accuracy) for result in results]
        for label, results in curves.items()
    }
    plot_accuracy_against_forwards(points, path, Path(benchmark).name, metric=METRIC, unit="problem")
