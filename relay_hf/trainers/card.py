"""The card of a training run: the facts that a trainer knows, for `hub_cards`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import ceil
from pathlib import Path
from statistics import mean
from typing import Any

from ..hub_cards import (
    NOT_EVALUATED,
    DatasetFacts,
    RelayCardData,
    TrainingFacts,
    cite_model,
    describe_channel,
    describe_model,
    hardware,
    is_hub_id,
    link_model,
    usage_snippet,
    versions,
)
from ..modeling import RelayConfig
from ..modeling.unmasking_relay import POLICIES
from .relay_config import RelayTrainerConfig
from .rollouts.reference import Reference

# The arguments that decide what is learned, a topic a line, in the order in which a reader asks for them.
ARGUMENTS = (
    "objective", "rollout_steps", "gradient_window", "step_reduction", "loss_weight_cap", "z_loss",
    "unmasking_policy", "unmasking_threshold", "unmasking_count", "threshold_jitter",
    "sub_block_size", "clean_block_starts",
    "learning_rate", "relay_learning_rate", "lr_scheduler_type", "warmup_steps",
    "optim", "weight_decay", "relay_weight_decay", "max_grad_norm", "ema_decay",
    "rows_on_demand", "staggered_start",
    "per_device_train_batch_size", "gradient_accumulation_steps", "world_size",
    "max_length", "assistant_only_loss", "completion_only_loss",
    "gradient_checkpointing", "bf16", "seed",
)  # fmt: skip
# Arguments that are shown only if changed from the library's default.
RARER_ARGUMENTS = (
    "num_train_epochs", "max_steps",
    "lr_scheduler_kwargs", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
    "average_tokens_across_devices", "fp16", "tf32", "neftune_noise_alpha", "router_aux_loss_coef",
    "train_sampling_strategy", "shuffle_dataset", "data_seed", "dataloader_drop_last", "truncation_mode",
    "load_best_model_at_end", "metric_for_best_model",
)  # fmt: skip
ADAPTER_ARGUMENTS = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules")
TRAINING_PICTURE = "training.png"  # beside the card
LOOKED_AT = 1000  # rows sampled for the length statistics
LOGGED = 40  # rows of the table of losses


def training_card(trainer: Any, name: str, dataset_names: Sequence[str], picture: str | None) -> RelayCardData:
    """Everything that a card says about a run; the card has no evaluation, because training makes none.

    Args:
        trainer: a `RelayTrainer`.
        name: name of the model.
        dataset_names: Hub ids or other names of the data sets; if empty, the Hub id that the data set was loaded from.
        picture: file name of a plot of the losses, beside the card; None = no plot.
    """
    args, config, state, tokenizer = trainer.args, trainer.relay_config, trainer.state, trainer.processing_class
    model, rows = trainer.model, _describe_rows(trainer.train_dataset, state.epoch)
    losses = _losses(state.log_history)
    return RelayCardData(
        name=name,
        base_model=getattr(model.config, "_name_or_path", "") or None,
        objective=args.objective,
        objective_description=args.recipe.sentence,
        channel=describe_channel(config),
        model={"Parameters": f"{sum(p.numel() for p in model.parameters()):,}", **describe_model(config)},
        training=TrainingFacts(
            datasets=[_dataset(name) for name in dataset_names or _hub_ids(trainer.train_dataset)],
            recipe=" ".join(filter(None, (rows, _describe_reference(trainer.reference)))),
            arguments={**_arguments(args), **_adapter_arguments(model)},
            steps=state.global_step,
            seconds=next((e["train_runtime"] for e in reversed(state.log_history) if "train_runtime" in e), None),
            losses={f"Last {name}": loss for of_step in losses.values() for name, loss in of_step.items()},
            log=_thin(losses),
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            hardware=hardware(),
            versions=versions(),
            picture=picture,
        ),
        usage=usage_snippet(str(Path(args.output_dir).resolve()), config, tokenizer) if tokenizer is not None else "",
        citations=_citations(args, config),
        limits=[NOT_EVALUATED],
        pipeline_tag="text-generation" if config.block_size is not None else None,
    )


def _arguments(args: RelayTrainerConfig) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(args)}
    rarer = [name for name in RARER_ARGUMENTS if getattr(args, name) not in (defaults[name], None, {})]
    values = {name: getattr(args, name) for name in (*ARGUMENTS, *rarer)}
    return {name: getattr(value, "value", value) for name, value in values.items()}


def _adapter_arguments(model: Any) -> dict[str, Any]:
    """The arguments of the adapters, by names such as "adapter.r"; empty if there is no adapter."""
    adapters = getattr(model, "peft_config", {}).values()
    values = {name: getattr(adapter, name, None) for adapter in adapters for name in ADAPTER_ARGUMENTS}
    return {
        f"adapter.{name}": ", ".join(sorted(value)) if isinstance(value, set | list) else getattr(value, "value", value)
        for name, value in values.items()
    }


def _hub_ids(dataset: Any) -> list[str]:
    """Hub ids that a data set was loaded from; empty for local data sets and for mixtures, which do not record them."""
    files = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    return sorted(
        {found[1] for file in files if (found := re.match(r"hf://datasets/([^/@]+(?=@)|[^/@]+/[^/@]+)", file))}
    )


def _dataset(name: str) -> DatasetFacts:
    """A link for a Hub id; for a path only its last part, because the rest means nothing on another machine."""
    if is_hub_id(name):
        return DatasetFacts(name, hub_id=name)
    return DatasetFacts(Path(name).name if Path(name).exists() else name)


def _describe_rows(dataset: Any, epochs: float | None) -> str:
    """Number and length of the rows, and how often they were read; empty for streams, whose size is unknown."""
    if "input_ids" not in (getattr(dataset, "column_names", None) or []) or not hasattr(dataset, "num_rows"):
        return ""
    lengths = [len(ids) for ids in dataset[:LOOKED_AT]["input_ids"]]
    text = f"The training set has {dataset.num_rows:,} row{'s' if dataset.num_rows > 1 else ''}"
    if min(lengths) == max(lengths):
        text += f" of {lengths[0]} tokens"
    else:
        text += f" of {min(lengths)} to {max(lengths)} tokens, {mean(lengths):.0f} on average"
    text += "" if dataset.num_rows <= LOOKED_AT else f" in the first {LOOKED_AT:,}"
    return f"{text}; {epochs:.3g} epochs of it were read." if epochs else f"{text}."


def _losses(log_history: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Step -> name -> loss, for every loss in the log."""
    losses: dict[int, dict[str, float]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if found := re.fullmatch(r"loss|eval_(?:(.+)_)?loss", name):
                label = "training loss" if name == "loss" else "evaluation loss"
                label += f" `{found[1]}`" if found[1] else ""
                losses.setdefault(int(entry["step"]), {})[label] = float(value)
    return losses


def _thin(losses: Mapping[int, Mapping[str, float]]) -> dict[int, Mapping[str, float]]:
    """At most `LOGGED` rows, the last always included; empty for a single one, which the card reports elsewhere."""
    if len(losses) < 2:
        return {}
    stride = ceil(len(losses) / LOGGED)
    return {step: losses[step] for step in sorted(sorted(losses, reverse=True)[::stride])}


def _citations(args: RelayTrainerConfig, config: RelayConfig) -> list[str]:
    """Citations of the model, of the objective and of the unmasking policy."""
    of_policy = POLICIES.find(args.unmasking_policy).citation if args.recipe.uses_buffer else ""
    citations = [*cite_model(config), args.recipe.citation, of_policy]
    return [citation for citation in dict.fromkeys(citations) if citation]


def _describe_reference(reference: Reference | None) -> str:
    if reference is None:
        return ""
    name = getattr(reference.config, "_name_or_path", "")
    which = link_model(name) if name else "a model without a name"
    return f"The state came from the predictions of a frozen reference, {which}, for the same noisy text."
