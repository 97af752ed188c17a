"""What decoding and training cost on the test device: waits and launches per start, block and step.

Only public names are used, so that `benchmarks/waits.py` can measure older checkouts with this file, too.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, Qwen2Config, TrainerCallback
from transformers.generation.streamers import BaseStreamer

from relay_hf import RelayConfig, RelayForMaskedDiffusion, RelayTrainer, RelayTrainerConfig
from relay_hf.modeling import make_policy
from relay_hf.tasks.sudoku import make_sudoku_tokenizer

from . import fakegpu

BLOCK, VOCAB = 32, 128


class Blocks(BaseStreamer):
    """Takes finished blocks."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class Drafts(Blocks):
    """Takes what every step leaves."""

    def put_draft(self, value: Tensor) -> None: ...


# Lengths of the prompts: "ragged" rows differ in the number of whole blocks, and in what is left of the last one. Rows
# end where sub-blocks do: beyond an end, positions of its sub-block may be revealed first, and weights would decide it.
BATCHES = {"one row": [72], "8 even": [72] * 8, "8 ragged": [32, 64, 96, 40, 72, 104, 48, 80]}
# What is generated beside plain greedy decoding: prompts, and options.
DECODING: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in BATCHES},
    **{f"{name}, static": (name, {"cache_implementation": "static"}) for name in BATCHES},
    "one row, sampling": ("one row", {"do_sample": True}),
    "8 ragged, sampling": ("8 ragged", {"do_sample": True}),
    "one row, fused commits": ("one row", {"fuse_commits": True}),
    "one row, sub-block cache": ("one row", {"use_sub_block_cache": True}),
    "one row, self start": ("one row", {"relay_start": "self"}),
    "8 even, criteria": ("8 even", {"stopping_criteria": [lambda ids, scores: ids[:, -1] < 0]}),
    "one row, time limit": ("one row", {"max_time": 1e6}),
    "one row, streamer": ("one row", {"streamer": Blocks()}),
    "one row, drafts": ("one row", {"streamer": Drafts()}),
    "8 ragged, stop tokens": ("8 ragged", {"eos_token_id": [VOCAB - 2], "sequence_bias": [[[VOCAB - 2], -1e9]]}),
}
CHANNELS = ("none", "layer_norm", "residual_context", "soft_mask")
# Objectives and the numbers of steps that they can be trained with; None = the objective has its own.
OBJECTIVES: dict[str, tuple[int | None, ...]] = {
    "relay": (1, 2, 4),
    "relay_sg": (1, 2, 4),
    "rollout": (1, 2, 4),
    "masked": (None,),
    "complementary": (None,),
    "residual_context": (None,),
}


@dataclass(frozen=True)
class Costs:
    """Waits for the device, and launches on it."""

    waits: float
    launches: float

    @classmethod
    def of(cls, counts: fakegpu.Counts) -> "Costs":
        return cls(counts.waits.total(), counts.launches)

    def plus(self, other: "Costs", times: float = 1.0) -> "Costs":
        return Costs(self.waits + times * other.waits, self.launches + times * other.launches)

    def rounded(self) -> "Costs":
        return Costs(round(self.waits, 2), round(self.launches, 1))


def build_model(layers: int, channel: str, dtype: torch.dtype, **fields: Any) -> RelayForMaskedDiffusion:
    """The layers of a Qwen2, so narrow that a CPU computes them at once; on the device, as a GPU would hold it."""
    text = Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    options = {"token_shift": True, "block_size": BLOCK, "mask_token_id": VOCAB - 1, "relay_channel": channel}
    model = RelayForMaskedDiffusion(RelayConfig(text_config=text, **{**options, **fields})).to(dtype)
    model.relay.float()
    return model.to(fakegpu.load())


# -- decoding ---------------------------------------------------------------------------------------------------------


def prompts(lengths: list[int]) -> dict[str, Tensor]:
    """Random prompts of these lengths, padded on the left."""
    width = max(lengths)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    ids = torch.randint(1, VOCAB - 2, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    device = fakegpu.load()
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@contextmanager
def counting_steps() -> Iterator[list[int]]:
    """Appends to a list in every denoise step, each of which asks the policy once."""
    policy, steps = type(make_policy("confidence_threshold", 1.0)), []
    reveal = policy.__call__

    def counted(self: Any, *arguments: Any) -> Tensor:
        steps.append(1)
        return reveal(self, *arguments)

    with mock.patch.object(policy, "__call__", counted):
        yield steps


def decoding_costs(model: RelayForMaskedDiffusion, name: str) -> dict[str, Costs]:
    """Costs of a `generate`, of a block and of a denoise step, each beside the others; and of all, per denoise step.

    They follow from three runs: a few steps of one block, more steps of it, and one more block. Every step reveals one
    token of each row. Steps that run some of the rows launch more than those that run all, so that in ragged batches
    the launches of a start and of a block say nothing.

    Args:
        model: on the device.
        name: one of `DECODING`.
    """
    batch, options = DECODING[name]
    inputs = prompts(BATCHES[batch])
    options = {"eos_token_id": None, "pad_token_id": 0, "unmasking_threshold": 1.0, **options}
    runs = []
    for new_tokens in (8, 16, 16 + BLOCK):
        torch.manual_seed(0)
        with counting_steps() as steps, fakegpu.count() as counts:
            model.generate(**inputs, max_new_tokens=new_tokens, **options)
        runs.append((len(steps), Costs.of(counts)))
    (few, first), (more, second), (most, third) = runs
    step = Costs(0, 0).plus(second.plus(first, -1), 1 / (more - few))
    block = third.plus(second, -1).plus(step, more - most)
    start = first.plus(block, -1).plus(step, -few)
    every = Costs(0, 0).plus(third, 1 / most)
    return {"start": start, "block": block, "step": step, "all": every}


# -- training ---------------------------------------------------------------------------------------------------------


class PerStep(TrainerCallback):
    """Counts what happens from the end of an optimizer step to the end of the next."""

    def __init__(self) -> None:
        self.costs: list[Costs] = []
        self.counts: list[fakegpu.Counts] = []
        self._counting: Any = None

    def on_train_begin(self, *arguments: Any, **kwargs: Any) -> None:
        self._begin()

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        self._counting.__exit__(None, None, None)
        self.costs.append(Costs.of(self.counts[-1]))
        self._begin()

    def on_train_end(self, *arguments: Any, **kwargs: Any) -> None:
        self._counting.__exit__(None, None, None)

    def _begin(self) -> None:
        self._counting = fakegpu.count()
        self.counts.append(self._counting.__enter__())


def training_data() -> Dataset:
    """Rows of three blocks, the first of which is the prompt."""
    draw = random.Random(0)
    rows = [[draw.randint(1, VOCAB - 3) for _ in range(3 * BLOCK)] for _ in range(32)]
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100] * BLOCK + row[BLOCK:] for row in rows]})


def training_costs(layers: int, objective: str, rollout_steps: int | None, **options: Any) -> dict[str, Costs]:
    """Costs of an optimizer step, and of what logging adds to it, in bf16 autocast without checkpointing.

    Args:
        layers: of the model.
        objective: what is learned.
        rollout_steps: K, or None for objectives with steps of their own.
        options: training arguments.
    """
    channel, per_step = "residual_context" if objective == "residual_context" else "layer_norm", PerStep()
    given = {} if rollout_steps is None else {"rollout_steps": rollout_steps}
    # All rows are new at first, and so little is revealed that all stay for as long as is measured.
    given |= {"unmasking_policy": "fixed_count", "unmasking_threshold": 1, "staggered_start": False}
    with TemporaryDirectory() as folder:
        arguments = RelayTrainerConfig(
            folder, objective=objective, max_steps=6, per_device_train_batch_size=4, logging_steps=3, bf16=True,
            save_strategy="no", report_to=[], disable_tqdm=True, gradient_checkpointing=False,
            dataloader_pin_memory=False, **{**given, **options},
        )  # fmt: skip
        trainer = RelayTrainer(
            build_model(layers, channel, torch.float32).cpu(), arguments, train_dataset=training_data(),
            processing_class=make_sudoku_tokenizer(6), callbacks=[per_step],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    # The first steps warm up. The third is logged after its end; norms for the next line are taken in the sixth.
    logs, plain, norms = per_step.costs[3:]
    return {"step": plain, "logging": logs.plus(norms).plus(plain, -2)}
