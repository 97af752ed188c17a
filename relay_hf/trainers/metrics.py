"""Numbers that tell whether the relay channel is used."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .rollout import Rollout


def is_channel_parameter(name: str) -> bool:
    """Whether a parameter name belongs to the relay channel, also inside a PEFT wrapper."""
    return "relay" in name.split(".")


def rollout_metrics(rollout: Rollout, reveals: bool) -> dict[str, float]:
    """What one micro-batch of this process showed.

    Args:
        rollout: when its last window has run.
        reveals: whether its steps reveal positions.

    Returns:
        Fraction of the learned positions that was masked first, loss per step, and positions revealed per step and row.
    """
    rows = rollout.rows
    values = {"masked_fraction": rollout.step_masked[0].sum() / rows.maskable.sum().clamp(min=1)}
    for step, loss in enumerate(rollout.step_losses, start=1):
        values[f"loss_step_{step}"] = loss
    if reveals:
        for step, (before, after) in enumerate(pairwise([*rollout.step_masked, rows.masked]), start=1):
            values[f"reveals_step_{step}"] = (before & ~after).sum() / len(rows)
    # One transfer from the device for all.
    return dict(zip(values, torch.stack([value.float() for value in values.values()]).tolist(), strict=True))


class ChannelNorms(TrainerCallback):
    """Measures the channel's weights and gradients just before the optimizer steps that are logged, so after clipping.

    Args:
        metrics: lists by name, emptied by the trainer when it logs.
    """

    def __init__(self, metrics: dict[str, list[float]]) -> None:
        self.metrics = metrics

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        # Unlike that of the arguments, the state's interval is never a fraction of the run.
        if not state.logging_steps or (state.global_step + 1) % state.logging_steps:
            return
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        channel = [(name, p) for name, p in named if is_channel_parameter(name)]
        if not channel:
            return
        gradient = total_norm(p.grad for _, p in channel)
        backbone = total_norm(p.grad for name, p in named if not is_channel_parameter(name))
        values = {
            "relay_weight_norm": total_norm(p for name, p in channel if name.endswith("weight")),
            "relay_bias_norm": total_norm(p for name, p in channel if name.endswith("bias")),
            "relay_grad_norm": gradient,
            "relay_grad_ratio": gradient / max(backbone, torch.finfo(torch.float32).tiny),
        }
        for name, value in values.items():
            self.metrics[name].append(value)


def total_norm(tensors: Iterable[Tensor | None]) -> float:
    """Norm of all tensors that are there, taken as one vector; 0 if none is."""
    present = [tensor.detach() for tensor in tensors if tensor is not None]
    norm = torch.nn.utils.get_total_norm(present)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
