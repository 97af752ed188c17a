"""The card's YAML block.

It says `library_name: transformers`: the Hub knows that library, and its Auto classes load the model; `relay_hf` is a
tag. Results go into the `model-index`, the machine-readable form of the Hub.
"""

from huggingface_hub import EvalResult, ModelCardData

from .card_data import Evaluation, EvaluationRow, RelayCardData
from .hub_ids import is_hub_id
from .markdown import slug

OWN_TAG = "relay_hf"
TAGS = (OWN_TAG, "masked-diffusion", "text-diffusion")


def make_metadata(data: RelayCardData) -> ModelCardData:
    """The card's YAML block."""
    datasets = [dataset.hub_id for dataset in data.training.datasets if dataset.hub_id] if data.training else []
    results = [result for evaluation in data.evaluations for result in make_results(evaluation, data.pipeline_tag)]
    return ModelCardData(
        license=data.license,
        language=list(data.language) or None,
        library_name="transformers",
        pipeline_tag=data.pipeline_tag,
        tags=[*TAGS, *(["relay"] if data.channel else []), *data.tags],
        base_model=data.base_model if is_hub_id(data.base_model) else None,
        datasets=datasets or None,
        model_name=data.name,
        eval_results=results or None,
    )


def make_results(evaluation: Evaluation, task: str | None) -> list[EvalResult]:
    """One result per metric and threshold of this model; those of other models in the table are not its results."""
    dataset = evaluation.dataset
    return [
        EvalResult(
            task_type=task or "text-generation",
            dataset_type=dataset.hub_id or slug(dataset.name) or "unnamed",
            dataset_name=dataset.name,
            dataset_config=dataset.config,
            dataset_split=dataset.split,
            metric_type=metric,
            metric_value=round(float(value), 6),
            metric_name=_metric_name(metric, row),
            metric_args=_metric_args(row),
        )
        for row in evaluation.own_rows
        for metric, value in row.metrics.items()
    ]


def _metric_name(metric: str, row: EvaluationRow) -> str:
    setting = "" if row.threshold is None else f"threshold {row.threshold:g}, "
    return f"{metric.replace('_', ' ')} ({setting}{row.denoise_forwards:.2f} denoise forwards)"


def _metric_args(row: EvaluationRow) -> dict[str, float | int]:
    threshold = {} if row.threshold is None else {"unmasking_threshold": float(row.threshold)}
    names = ("denoise_forwards", "commit_forwards", "prefill_forwards")
    forwards = {name: round(float(getattr(row, name)), 6) for name in names}
    return {**threshold, **forwards, "samples": int(row.samples), "seeds": int(row.seeds)}
