"""Numbers that tell whether the relay channel is used."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .rollout import RolloutResult


def is_channel_parameter(name: str) -> bool:
    """Whether a parameter name belongs to the relay channel, also inside a PEFT wrapper."""
    return "relay" in name.split(".")


def rollout_metrics(result: RolloutResult, refilled: int) -> dict[str, float]:
    """Loss, masked fraction and reveals per step, averaged over the rows of the micro-batch, and rows refilled."""
    rows, learned = len(result.rows.clean_ids), max(int(result.rows.maskable.sum()), 1)
    metrics = {"buffer_refills": float(refilled), "masked_fraction": float(result.step_masked[0]) / learned}
    for step, (loss, reveal) in enumerate(zip(result.step_losses, result.step_reveals, strict=True), start=1):
        metrics[f"loss_step_{step}"] = float(loss)
        metrics[f"reveals_step_{step}"] = float(reveal.sum()) / rows
    return metrics


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
        gradient = _norm(p.grad for _, p in channel)
        backbone = _norm(p.grad for name, p in named if not is_channel_parameter(name))
        values = {
            "relay_weight_norm": _norm(p for name, p in channel if name.endswith("weight")),
            "relay_bias_norm": _norm(p for name, p in channel if name.endswith("bias")),
            "relay_grad_norm": gradient,
            "relay_grad_ratio": gradient / max(backbone, torch.finfo(torch.float32).tiny),
        }
        for name, value in values.items():
            self.metrics[name].append(value)


def _norm(tensors: Iterable[Tensor | None]) -> float:
    present = [tensor.detach() for tensor in tensors if tensor is not None]
    return float(torch.nn.utils.get_total_norm(present)) if present else 0.0
