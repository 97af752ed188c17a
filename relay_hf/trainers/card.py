"""The card of a training run: what the trainer knows, told by `hub_cards`."""

import re
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..hub_cards import (
    FAST_DLLM_V2_CITATION,
    NOT_EVALUATED,
    DatasetFacts,
    RelayCardData,
    TrainingFacts,
    cite_model,
    describe_channel,
    describe_model,
    hardware,
    usage_snippet,
    versions,
)
from ..modeling import RelayConfig
from .objectives import RECIPES
from .reference import Reference
from .relay_config import RelayTrainerConfig

# The arguments that decide what is learned, in the order in which a reader asks for them.
ARGUMENTS = (
    "objective",
    "rollout_steps",
    "gradient_window",
    "unmasking_policy",
    "unmasking_threshold",
    "sub_block_size",
    "clean_block_starts",
    "threshold_jitter",
    "learning_rate",
    "relay_learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "relay_weight_decay",
    "max_grad_norm",
    "ema_decay",
    "buffer_queue_size",
    "staggered_start",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "max_length",
    "assistant_only_loss",
    "completion_only_loss",
    "gradient_checkpointing",
    "bf16",
    "seed",
)
ADAPTER_ARGUMENTS = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules")
LOOKED_AT = 1000  # rows whose lengths are told


def training_card(
    name: str,
    args: RelayTrainerConfig,
    config: RelayConfig,
    model: Any,
    state: Any,
    *,
    model_id: str,
    train_dataset: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dataset_names: Sequence[str] = (),
    reference: Reference | None = None,
    picture: str | None = None,
) -> RelayCardData:
    """What a card can say of a run: everything but an evaluation, which training does not make.

    Args:
        name: of the model.
        args, config: the run's arguments and the model's configuration.
        model: counted, and asked where it came from.
        state: the Trainer's, with the steps made so far and what was logged.
        model_id: folder or Hub id that the card's code loads.
        train_dataset: as the trainer has prepared it.
        tokenizer: of the text, if the model works on text.
        dataset_names: of the data, a Hub id each; without, what the data set itself knows.
        reference: the frozen model that supplied the state, if there was one.
        picture: name of an image of the losses beside the card.
    """
    return RelayCardData(
        name=name,
        base_model=getattr(model.config, "_name_or_path", "") or None,
        objective=args.objective,
        objective_description=RECIPES[args.objective].description,
        channel=describe_channel(config),
        model={"Parameters": f"{sum(p.numel() for p in model.parameters()):,}", **describe_model(config)},
        training=TrainingFacts(
            datasets=[DatasetFacts(name, hub_id=name) for name in dataset_names or _hub_ids(train_dataset)],
            recipe=" ".join(part for part in (_describe_rows(train_dataset), _describe_reference(reference)) if part),
            arguments={**_arguments(args), **_adapter_arguments(model)},
            steps=state.global_step,
            seconds=next((e["train_runtime"] for e in reversed(state.log_history) if "train_runtime" in e), None),
            losses=_last_losses(state.log_history),
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            hardware=hardware(),
            versions=versions(),
            picture=picture,
        ),
        usage=usage_snippet(model_id, config, tokenizer) if tokenizer is not None else "",
        citations=_citations(args, config),
        limits=[NOT_EVALUATED],
        pipeline_tag="text-generation" if config.block_size is not None else None,
    )


def _arguments(args: RelayTrainerConfig) -> dict[str, Any]:
    values = {name: getattr(args, name) for name in ARGUMENTS}
    return {name: getattr(value, "value", value) for name, value in values.items()}


def _adapter_arguments(model: Any) -> dict[str, Any]:
    """Of LoRA or the like, if there is one: "adapter.r" and so on."""
    adapters = getattr(model, "peft_config", {}).values()
    values = {name: getattr(adapter, name, None) for adapter in adapters for name in ADAPTER_ARGUMENTS}
    return {
        f"adapter.{name}": ", ".join(sorted(value)) if isinstance(value, set | list) else getattr(value, "value", value)
        for name, value in values.items()
    }


def _hub_ids(dataset: Any) -> list[str]:
    """Where a data set of the Hub was loaded from; nothing for others, and for mixtures, which do not remember."""
    files = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    return sorted({found[1] for file in files if (found := re.match(r"hf://datasets/([^/]+/[^/@]+)", file))})


def _describe_rows(dataset: Any) -> str:
    """How many rows there are, and how long; of streams neither is known."""
    if "input_ids" not in (getattr(dataset, "column_names", None) or []) or not hasattr(dataset, "num_rows"):
        return ""
    lengths = [len(ids) for ids in dataset[:LOOKED_AT]["input_ids"]]
    rows = f"Trained on {dataset.num_rows:,} row{'s' if dataset.num_rows > 1 else ''}"
    if min(lengths) == max(lengths):
        return f"{rows} of {lengths[0]} tokens."
    which = "" if dataset.num_rows <= LOOKED_AT else f" in the first {LOOKED_AT:,}"
    return f"{rows} of {min(lengths)} to {max(lengths)} tokens, {mean(lengths):.0f} on average{which}."


def _last_losses(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    last = {name: float(value) for entry in log_history for name, value in entry.items() if name.endswith("loss")}
    names = {"loss": "Last training loss", "eval_loss": "Held-out loss"}
    held_out = {name: f"Held-out loss `{name[5:-5]}`" for name in last if re.fullmatch(r"eval_.+_loss", name)}
    return {label: last[name] for name, label in {**names, **held_out}.items() if name in last}


def _citations(args: RelayTrainerConfig, config: RelayConfig) -> list[str]:
    """The model's, and that of the objective."""
    of_model = cite_model(config)
    is_cited = args.objective != "complementary" or FAST_DLLM_V2_CITATION in of_model
    return of_model if is_cited else [*of_model, FAST_DLLM_V2_CITATION]


def _describe_reference(reference: Reference | None) -> str:
    if reference is None:
        return ""
    name = getattr(reference.config, "_name_or_path", "") or "a model without a name"
    return f"The state came from the predictions of a frozen reference, {name}, for the same noisy text."
