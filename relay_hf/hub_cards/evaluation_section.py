"""A table of results as the card shows it: accuracy, and forwards of each kind."""

from collections.abc import Sequence

from .card_data import DatasetFacts, Evaluation, EvaluationRow
from .markdown import paragraphs, sentence, table

PICTURE_TEXT = "Accuracy against mean denoise forwards, one curve per model"


def describe_evaluation(evaluation: Evaluation) -> str:
    """The text below the heading of the data set: protocol, table, the model in a sentence, picture."""
    parts = [
        _caption(evaluation),
        _table(evaluation),
        _summary(evaluation),
        paragraphs(evaluation.comment),
        f"![{PICTURE_TEXT}]({evaluation.picture})" if evaluation.picture else "",
    ]
    return "\n\n".join(part for part in parts if part)


def describe_dataset(dataset: DatasetFacts) -> str:
    """Name, with a link if it is on the Hub, part and description."""
    name = f"[{dataset.name}](https://huggingface.co/datasets/{dataset.hub_id})" if dataset.hub_id else dataset.name
    part = ", ".join(part for part in (dataset.config, dataset.split) if part)
    name += f" ({part})" if part else ""
    return f"{name}: {sentence(dataset.description)}" if dataset.description.strip() else f"{name}."


def _caption(evaluation: Evaluation) -> str:
    samples, seeds = _shared(evaluation.rows, "samples"), _shared(evaluation.rows, "seeds")
    text = f"On {describe_dataset(evaluation.dataset)} Forwards are means per {evaluation.unit}"
    text += f" over {samples} {evaluation.unit}s" if samples else ""
    if seeds and seeds > 1:
        spread = " (± one standard deviation)" if any(row.spread for row in evaluation.rows) else ""
        text += f"; every row is the mean over {seeds} training seeds{spread}, and this checkpoint is one of them"
    return text + "."


def _table(evaluation: Evaluation) -> str:
    """Columns that say the same in every row are in the caption instead."""
    rows = evaluation.rows
    columns: dict[str, list[str]] = {"Model": [row.label for row in rows]}
    if any(row.threshold is not None for row in rows):
        columns["Threshold"] = ["" if row.threshold is None else f"{row.threshold:g}" for row in rows]
    for metric in rows[0].metrics:
        name = _pretty(metric)
        columns[f"{name[:1].upper()}{name[1:]} (%)"] = [_percent(row, metric) for row in rows]
    for kind in ("denoise", "commit", "prefill"):
        columns[f"{kind.capitalize()} forwards"] = [f"{getattr(row, f'{kind}_forwards'):.2f}" for row in rows]
    for name in ("samples", "seeds"):
        if _shared(rows, name) is None:
            columns[name.capitalize()] = [str(getattr(row, name)) for row in rows]
    bold = rows.index(evaluation.highlighted)
    for cells in columns.values():
        cells[bold] = f"**{cells[bold]}**" if cells[bold] else ""
    return table(columns, "---:")


def _summary(evaluation: Evaluation) -> str:
    row = evaluation.highlighted
    metric, value = next(iter(row.metrics.items()))
    setting = [row.label]
    setting += [] if row.threshold is None else [f"threshold {row.threshold:g}"]
    setting += [f"mean over {row.seeds} seeds"] if row.seeds > 1 else []
    return (
        f"In bold, this model ({', '.join(setting)}): {_pretty(metric)} {100 * value:.1f} % at "
        f"{row.denoise_forwards:.2f} denoise, {row.commit_forwards:.2f} commit and "
        f"{row.prefill_forwards:.2f} prefill forwards per {evaluation.unit}."
    )


def _shared(rows: Sequence[EvaluationRow], name: str) -> int | None:
    """The number that all rows have in common, or None."""
    values = {getattr(row, name) for row in rows}
    return values.pop() if len(values) == 1 else None


def _percent(row: EvaluationRow, metric: str) -> str:
    spread = row.spread.get(metric)
    return f"{100 * row.metrics[metric]:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def _pretty(metric: str) -> str:
    return metric.replace("_", " ")
