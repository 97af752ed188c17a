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
    """Called before the loss is differentiated.

    Args:
        loss: of a window.
        step_losses: of each denoising step so far.
        global_step: optimizer steps made so far.

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
    """A finite loss can still have an infinite gradient, and gradient clipping would spread it to every weight."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Looks at the gradients before the optimizer does.

        Raises:
            FloatingPointError: one is infinite or NaN.
        """
        if args.fp16:  # its loss scaling tries for such gradients, and skips the step by itself
            return
        norm = total_norm(parameter.grad for parameter in model.parameters())
        if not math.isfinite(norm):
            raise FloatingPointError(f"The gradient of training step {state.global_step + 1} has norm {norm}. {ADVICE}")
