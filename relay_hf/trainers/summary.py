"""Describes a training run in a few lines, before it starts."""

import time
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, cast

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..modeling import RelayConfig
from .channel_parameters import is_channel_parameter
from .relay_config import RelayTrainerConfig

SHOWN_TEXT, SHOWN_PARTS = 160, 6  # characters of a part of the shown row, and parts of it
BATCH = 10_000


def describe_run(trainer: Any) -> str:
    """The summary of a `RelayTrainer`, one fact a line; nothing is trained, drawn or written."""
    args, config = trainer.args, trainer.relay_config
    facts = {
        "data": _describe_rows(trainer.train_dataset, trainer.rows_given, args.max_length),
        "objective": [_describe_objective(args, config)],
        "steps": [_describe_steps(trainer)],
        "parameters": [_describe_parameters(trainer.model)],
        "memory": [_describe_memory(trainer)],
        "one row": _describe_row(trainer.train_dataset, trainer.processing_class, config),
    }
    return "\n".join(line for label, lines in facts.items() for line in _lines(label, lines))


def _lines(label: str, lines: list[str]) -> Iterator[str]:
    return (f"  {label if not index else '':<12}{line}" for index, line in enumerate(lines))


def _describe_rows(dataset: Any, given: int | None, max_length: int | None) -> list[str]:
    if not isinstance(dataset, Dataset):
        return ["a stream, whose rows are read, cut and checked as they come"]
    if not {"input_ids", "labels"} <= set(dataset.column_names):
        return [f"{len(dataset):,} rows, prepared by the data collator"]
    tokens = learned = longest = full = 0
    for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(BATCH):
        lengths = pc.list_value_length(batch["input_ids"])
        tokens += pc.sum(lengths).as_py()
        longest = max(longest, pc.max(lengths).as_py())
        full += pc.sum(pc.equal(lengths, max_length)).as_py() if max_length is not None else 0
        learned += pc.sum(pc.not_equal(pc.list_flatten(batch["labels"]), -100)).as_py()
    lines = [f"{len(dataset):,} rows, {tokens:,} tokens, {learned:,} of them learned; the longest row has {longest:,}"]
    if full:
        lines.append(f"{full:,} rows fill `max_length={max_length}`: they are cut there, unless they are just as long")
    if given is not None and given > len(dataset):
        lines.append(f"{given - len(dataset):,} of {given:,} rows left out: cut to `max_length`, they hold no response")
    return lines


def _describe_objective(args: RelayTrainerConfig, config: RelayConfig) -> str:
    recipe = args.recipe
    count = len(recipe.advances(args, config, False))
    steps = f"; {count} denoising steps per rollout" if recipe.uses_buffer else ""
    block = f"blocks of {config.block_size}" if config.block_size is not None else "the whole row as one block"
    return f"{args.objective} ({recipe.sentence}{steps}), {block}, channel {config.relay_channel}"


def _describe_steps(trainer: Any) -> str:
    args = trainer.args
    _, per_epoch, _, _, total_batch, _, steps = trainer.set_initial_training_values(
        args, trainer.get_train_dataloader()
    )
    parts = [
        f"{args.per_device_train_batch_size} per process",
        *([f"{args.gradient_accumulation_steps} accumulated"] if args.gradient_accumulation_steps > 1 else []),
        *([f"{args.world_size} processes"] if args.world_size > 1 else []),
    ]
    text = f"{steps:,} of {total_batch:,} rows ({', '.join(parts)})"
    if args.estimates_steps:
        return f"about {text}, until every row was revealed in each of {args.num_train_epochs:g} epochs"
    if args.draws_rows:
        return f"{text}, each of which stays for several steps"
    epochs = f", {steps / per_epoch:.3g} epochs" if isinstance(trainer.train_dataset, Dataset) else ""
    dropped = "; a row stays for several steps, and rows that find no place meanwhile are dropped"
    return text + epochs + (dropped if epochs and args.recipe.uses_buffer else "")


def _describe_parameters(model: Any) -> str:
    named = list(model.named_parameters())
    trained, everything = model.num_parameters(only_trainable=True), model.num_parameters()
    channel = sum(p.numel() for name, p in named if p.requires_grad and is_channel_parameter(name))
    return (
        f"{trained:,} trained of {everything:,} ({trained / everything:.2%}), {channel:,} of them the relay channel's"
    )


def _describe_memory(trainer: Any) -> str:
    """Memory of weights, gradients, optimizer and average; activations depend on the positions that a step denoises."""
    model, args = trainer.model, trainer.args
    trained = [p for p in model.parameters() if p.requires_grad]
    counted: dict[str, int | None] = {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.nbytes for p in trained),
        f"optimizer ({getattr(args.optim, 'value', args.optim)})": optimizer_bytes(trainer, trained),
    }
    if trainer.weight_average is not None:
        counted["moving average"] = sum(t.nbytes for t in trainer.weight_average.average.values())
    parts = ", ".join(f"{name} {'unknown' if n is None else _mebibytes(n)}" for name, n in counted.items())
    total = _mebibytes(sum(n for n in counted.values() if n is not None))
    divided = f", before {args.world_size} processes divide them" if _is_sharded(trainer) else ""
    return f"{parts}: {total}{divided}; activations are not included"


def optimizer_bytes(trainer: Trainer, parameters: list[nn.Parameter]) -> int | None:
    """Bytes of the optimizer's state, from a step on meta tensors; None if the optimizer needs real tensors."""
    if trainer.optimizer is not None:
        return None  # given by the user
    try:
        kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, cast(PreTrainedModel, trainer.model))
        copies = [nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters]
        for copy in copies:
            copy.grad = torch.empty_like(copy)
        optimizer = kind(copies, **{name: value for name, value in options.items() if name != "fused"})
        optimizer.step()
    except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))


def _is_sharded(trainer: Any) -> bool:
    return trainer.args.world_size > 1 and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"


def _describe_row(dataset: Any, tokenizer: Any, config: RelayConfig) -> list[str]:
    """The first row, with its visible and its learned parts."""
    row = next(iter(dataset), None)
    if row is None or not {"input_ids", "labels"} <= set(row):
        return ["is made by the data collator, batch by batch"]
    ids, labels = list(row["input_ids"]), list(row["labels"])
    learned = sum(label != -100 for label in labels)
    head = f"{len(ids):,} tokens, {learned:,} of them learned: masked at first, and revealed step by step"
    if config.block_size is not None and len(ids) % config.block_size:
        head += f"; {-len(ids) % config.block_size} more [MASK] fill the last block, visible and not learned"
    parts = [
        (is_learned, [token for token, _ in group])
        for is_learned, group in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != -100)
    ]
    lines = [
        f"{'learned' if is_learned else 'visible':<8}{_shorten(tokenizer, tokens)}" for is_learned, tokens in parts
    ]
    more = len(lines) - SHOWN_PARTS
    return [head, *lines[:SHOWN_PARTS], *([f"... and {more} parts more"] if more > 0 else [])]


def _shorten(tokenizer: Any, tokens: list[int]) -> str:
    decode: Callable[[list[int]], str] = getattr(tokenizer, "decode", str)
    text = decode(tokens)
    if len(text) > SHOWN_TEXT:
        text = f"{text[: SHOWN_TEXT // 2]} [...] {text[-SHOWN_TEXT // 2 :]}"
    return repr(text)


class _TimeTwoSteps(TrainerCallback):
    """Ends the training after its second step and times this step: the first one includes one-time costs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        _wait()
        self.seconds = -time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        _wait()
        self.seconds += time.perf_counter()
        control.should_training_stop = control.should_training_stop or state.global_step >= 2


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def time_two_steps(trainer: Any) -> str:
    """Trains two steps without saving anything; returns a line with the estimated time of the whole training.

    The trainer cannot be used afterwards: its weights have changed.
    """
    timer = _TimeTwoSteps()
    trainer.add_callback(timer)
    args = trainer.args
    args.load_best_model_at_end = False
    args.logging_strategy = args.eval_strategy = args.save_strategy = IntervalStrategy.NO
    trainer.train()
    minutes = timer.seconds * trainer.state.max_steps / 60
    steps = f"{'about ' if args.estimates_steps else ''}{trainer.state.max_steps:,} steps"
    text = f"{timer.seconds:.2f} s for a step, measured here: {minutes:,.1f} min for {steps}"
    text += " like it, without evaluation and saving"
    if args.device.type == "cuda":
        text += f"; {_mebibytes(torch.cuda.max_memory_allocated())} at most, activations included"
    return "\n".join(_lines("time", [text]))
