"""What the study shows: a table, a picture, a JSON file and a model with its card."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..hub_cards import (
    DatasetFacts,
    Evaluation,
    EvaluationRow,
    RelayCardData,
    TrainingFacts,
    describe_channel,
    describe_model,
    fill_in_snippet,
    hardware,
    save_card,
    versions,
)
from ..pictures.accuracy import CurvePoint, plot_accuracy_against_forwards
from .arguments import DemoArguments
from .study import DEFAULT_THRESHOLD, THRESHOLDS, WARMUP_LEARNING_RATE, Study, trainer_options

PICTURE = "accuracy_against_forwards.png"
METRICS = ("exact_match", "cell_accuracy", "legal")


def evaluation_rows(study: Study) -> dict[str, list[EvaluationRow]]:
    """Objective -> one row per threshold, averaged over the seeds."""
    rows: dict[str, list[EvaluationRow]] = {}
    for objective in dict.fromkeys(run.objective for run in study.runs):
        runs = [run for run in study.runs if run.objective == objective]
        for index, threshold in enumerate(THRESHOLDS):
            evaluations = [run.evaluations[index] for run in runs]
            values = {name: [getattr(e.scores, name) for e in evaluations] for name in METRICS}
            rows.setdefault(objective, []).append(
                EvaluationRow(
                    label=objective,
                    threshold=threshold,
                    metrics={name: statistics.mean(v) for name, v in values.items()},
                    spread={name: statistics.stdev(v) for name, v in values.items()} if len(runs) > 1 else {},
                    denoise_forwards=statistics.mean(e.denoise_forwards for e in evaluations),
                    commit_forwards=0.0,
                    prefill_forwards=0.0,
                    samples=evaluations[0].scores.puzzles,
                    seeds=len(runs),
                )
            )
    return rows


def format_table(rows: Mapping[str, list[EvaluationRow]]) -> str:
    """The table for the terminal."""
    lines = ["objective  threshold  exact match   cells   legal  denoise forwards per puzzle"]
    for objective_rows in rows.values():
        for row in objective_rows:
            exact, cells, legal = (100 * row.metrics[name] for name in METRICS)
            spread = f" ±{100 * row.spread['exact_match']:4.1f}" if row.spread else ""
            lines.append(
                f"{row.label:<10} {row.threshold:>9g} {exact:>10.1f} %{spread} {cells:>6.1f}% {legal:>6.1f}% "
                f"{row.denoise_forwards:>8.2f}"
            )
    return "\n".join(lines)


def compare_at_equal_forwards(rows: Mapping[str, list[EvaluationRow]], baseline: str) -> str:
    """One sentence: relay's exact match less the baseline's, where both spend the same number of forwards.

    The baseline is interpolated linearly between its thresholds; points of relay outside its range are left out.
    """
    reference = sorted((row.denoise_forwards, row.metrics["exact_match"]) for row in rows[baseline])
    forwards, accuracy = zip(*reference, strict=True)
    gains = [
        (row.metrics["exact_match"] - float(np.interp(row.denoise_forwards, forwards, accuracy)), row.denoise_forwards)
        for row in rows["relay"]
        if forwards[0] <= row.denoise_forwards <= forwards[-1]
    ]
    listed = (
        ", ".join(f"{100 * gain:+.1f} points at {spent:.1f}" for gain, spent in gains)
        or "the two never spend the same number"
    )
    return f"relay against {baseline} at equal forwards: {listed}."


def write_report(study: Study, arguments: DemoArguments) -> Path:
    """Prints the table; writes results, picture and the model with its card; returns the model's folder."""
    rows = evaluation_rows(study)
    table = format_table(rows)
    comparisons = [compare_at_equal_forwards(rows, objective) for objective in rows if objective != "relay"]
    print("\n" + table + "\n\n" + "\n".join(comparisons), flush=True)

    folder, model_folder = Path(arguments.output_dir).resolve(), arguments.model_folder.resolve()
    model_folder.mkdir(parents=True, exist_ok=True)
    # Written last: should anything fail, no old card describes new weights.
    (model_folder / "README.md").unlink(missing_ok=True)
    curves = {
        label: [
            CurvePoint(row.threshold, row.denoise_forwards, row.metrics["exact_match"], row.spread.get("exact_match"))
            for row in objective_rows
        ]
        for label, objective_rows in rows.items()
    }
    title = f"{arguments.size}x{arguments.size} Sudoku, {arguments.steps} adaptation steps"
    plot_accuracy_against_forwards(curves, model_folder / PICTURE, title=title)
    results = {
        "arguments": asdict(arguments),
        "warmup_seconds": study.warmup_seconds,
        "runs": [asdict(run) for run in study.runs],
        "hardware": hardware(),
        "versions": versions(),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    study.model.save_pretrained(model_folder)
    study.tokenizer.save_pretrained(model_folder)
    save_card(_card(study, arguments, rows, comparisons, model_folder), model_folder)
    return model_folder


def _card(
    study: Study,
    arguments: DemoArguments,
    rows: Mapping[str, list[EvaluationRow]],
    comparisons: list[str],
    model_folder: Path,
) -> RelayCardData:
    board = f"{arguments.size}x{arguments.size} Sudoku"
    source = f"puzzles of `{arguments.dataset}`"
    if arguments.dataset is None:
        source = f"puzzles of relay_hf's generator (seed 0), minimal ones with {arguments.extra_clues} clues added"
    train, test = study.puzzles["train"], study.puzzles["test"]
    return RelayCardData(
        name=model_folder.name,
        objective="relay",
        objective_description="back-propagation through two denoising steps and the state between them",
        channel=describe_channel(study.model.config),
        model=describe_model(study.model.config),
        training=TrainingFacts(
            datasets=[DatasetFacts(board, f"{len(train)} {source}, each row under a fresh random symmetry")],
            recipe=f"{arguments.warmup_steps} `masked` steps from scratch at learning rate {WARMUP_LEARNING_RATE:g}, "
            f"then {arguments.steps} `relay` steps. The models it is compared with had the same start and as many "
            "steps with their own objective; a step of a rollout takes two forward passes, a `masked` step one.",
            arguments=trainer_options("relay", arguments),
            steps=arguments.warmup_steps + arguments.steps,
            seconds=(study.warmup_seconds + sum(run.seconds for run in study.runs if run.objective == "relay"))
            / arguments.seeds,
            parameters=study.model.num_parameters(),
            hardware=hardware(),
            versions=versions(),
        ),
        evaluations=[
            Evaluation(
                dataset=DatasetFacts(
                    board,
                    f"{len(test)} held-out puzzles, none of them a symmetric twin of a training puzzle",
                    split="test",
                ),
                rows=[row for objective_rows in rows.values() for row in objective_rows],
                highlighted=next(row for row in rows["relay"] if row.threshold == DEFAULT_THRESHOLD),
                unit="puzzle",
                picture=PICTURE,
                comment=" ".join(comparisons),
            )
        ],
        usage=fill_in_snippet(str(model_folder), test[0]["question"]),
        limits=[
            f"A demonstration of the method: it knows nothing but {board}, and it is not the best solver of its size.",
            "Trained for minutes; the order of the objectives at this size need not hold for larger models.",
            *(["One training seed: differences of a few points are within noise."] if arguments.seeds == 1 else []),
        ],
        tags=["sudoku"],
    )
