"""Stops a run whose numbers have become infinite or NaN, while its weights are still good."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .metrics import total_norm

ADVICE = (
    "The weights are still those of the step before. Go on from the last checkpoint with a lower `learning_rate` (or "
    "`relay_learning_rate`), a smaller `max_grad_norm` or `bf16=False`, and look at the rows that came last."
)


def check_loss(loss: Tensor, step_losses: list[Tensor], global_step: int) -> None:
    """Raise if a loss is not finite; called before the loss is differentiated.

    Args:
        loss: loss of a window.
        step_losses: loss of each denoising step so far.
        global_step: number of optimizer steps so far.

    Raises:
        FloatingPointError: the loss is infinite or NaN.
    """
    if bool(torch.isfinite(loss)):
        return
    values = [float(value) for value in step_losses]
    raise FloatingPointError(
        f"The loss of training step {global_step + 1} is {float(loss.detach())} (denoising steps: {values}). {ADVICE}"
    )


class StopOnNonFiniteGradient(TrainerCallback):
    """Ends training before an infinite gradient, which a finite loss can have, reaches every weight by clipping."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Checks the gradients before the optimizer step.

        Raises:
            FloatingPointError: a gradient is infinite or NaN.
        """
        if args.fp16:  # the loss scaling of fp16 expects such gradients, and skips the step
            return
        norm = total_norm(parameter.grad for parameter in model.parameters())
        if not math.isfinite(norm):
            raise FloatingPointError(f"The gradient of training step {state.global_step + 1} has norm {norm}. {ADVICE}")
