"""Metrics of training: losses, masks and reveals of the rollouts, and norms of the relay channel."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .channel_parameters import is_channel_parameter
from .rollouts.rollout import Rollout

Number = float | Tensor  # a tensor has no axes


def fetch(numbers: list[Number]) -> list[float]:
    """The numbers on the host; those on a device come in one transfer."""
    on_device = [_whole(number).float() for number in numbers if isinstance(number, Tensor)]
    fetched = iter(torch.stack([n.to(on_device[0].device) for n in on_device]).tolist() if on_device else [])
    return [next(fetched) if isinstance(number, Tensor) else number for number in numbers]


class RunningMeans:
    """Weighted means of numbers by name, kept on their device until they are logged."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Number, Number]] = {}  # name -> sum of weight * value, sum of weights

    def add(self, values: Mapping[str, Number]) -> None:
        """Adds one number for each name."""
        for name, value in values.items():
            self.add_sum(name, value, 1.0)

    def add_sum(self, name: str, total: Number, count: Number) -> None:
        """Adds `count` numbers of one name, whose sum is `total`."""
        before, weight = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = before + total, weight + count

    def pop(self) -> dict[str, float]:
        """The means since the last call, by name; names without a number are left out."""
        numbers = fetch([number for pair in self._sums.values() for number in pair])
        means = {
            name: total / count
            for name, total, count in zip(self._sums, numbers[::2], numbers[1::2], strict=True)
            if count
        }
        self._sums = {}
        return means


def record_rollout(means: RunningMeans, rollout: Rollout, reveals: bool) -> None:
    """Adds the numbers of one micro-batch of this process.

    They are the fraction of the learned positions that was masked before the first step, the loss per step, the mean
    loss of positions by the masked fraction of their block, and the positions revealed per step and row.

    Args:
        means: receives the numbers.
        rollout: a rollout whose last window has run.
        reveals: whether the steps of the rollout reveal positions.
    """
    rows = rollout.rows
    values: dict[str, Number] = {
        "masked_fraction": rollout.step_masked[0].sum() / rows.learned.sum().clamp(min=1),
        **{f"loss_step_{step}": loss for step, loss in enumerate(rollout.step_losses, start=1)},
    }
    if reveals:
        for step, (before, after) in enumerate(pairwise([*rollout.step_masked, rows.masked]), start=1):
            values[f"reveals_step_{step}"] = (before & ~after).sum() / len(rows)
    means.add(values)
    for quarter, (total, count) in enumerate(rollout.loss_by_noise.unbind(-1), start=1):
        means.add_sum(f"loss_masked_{25 * quarter}", total, count)


class ChannelNorms(TrainerCallback):
    """Measures weights and gradients of the channel after clipping, in the optimizer steps that are logged.

    Args:
        means: receives the norms; the trainer empties it when it logs.
    """

    def __init__(self, means: RunningMeans) -> None:
        self.means = means

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        # `args.logging_steps` may be a fraction of the run, `state.logging_steps` is a number of steps.
        if not state.logging_steps or (state.global_step + 1) % state.logging_steps:
            return
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        channel = [(name, p) for name, p in named if is_channel_parameter(name)]
        if not channel:
            return
        gradient = total_norm(p.grad for _, p in channel)
        backbone = total_norm(p.grad for name, p in named if not is_channel_parameter(name))
        norms = {
            "relay_weight_norm": total_norm(p for name, p in channel if name.endswith("weight")),
            "relay_bias_norm": total_norm(p for name, p in channel if name.endswith("bias")),
            "relay_grad_norm": gradient,
            "relay_grad_ratio": gradient / (backbone + torch.finfo(torch.float32).tiny),
        }
        self.means.add(norms)


def total_norm(tensors: Iterable[Tensor | None]) -> Number:
    """Norm of all tensors that are not None, taken as one vector, on their device; 0 if all are None."""
    present = [tensor.detach() for tensor in tensors if tensor is not None]
    return _whole(torch.nn.utils.get_total_norm(present)) if present else 0.0


def _whole(number: Tensor) -> Tensor:
    return number.full_tensor() if isinstance(number, DTensor) else number
