"""Stops a run whose numbers have become infinite or NaN, while its weights are still good."""

import math
from itertools import chain

from torch import Tensor

from .metrics import Number, fetch

ADVICE = (
    "The weights are still those of the step before. Go on from the last checkpoint with a lower `learning_rate` (or "
    "`relay_learning_rate`), a smaller `max_grad_norm` or `bf16=False`, and look at the rows that came last."
)


class FiniteCheck:
    """Finds a loss or gradient that is infinite or NaN before the optimizer spreads it; a finite loss can have one.

    Losses stay on their device until the gradient is there, so that the host waits for both once.

    Attributes:
        losses: for each micro-batch since the last check, the losses of its denoising steps.
    """

    def __init__(self) -> None:
        self.losses: list[list[Tensor]] = []

    def __call__(self, global_step: int, norm: Number = 0.0, norm_may_overflow: bool = False) -> float:
        """Checks the losses since the last call, and the gradient.

        Args:
            global_step: number of optimizer steps so far.
            norm: of the gradient.
            norm_may_overflow: accept any norm: the loss scaling of fp16 expects such gradients, and skips the step.

        Returns:
            The norm.

        Raises:
            FloatingPointError: a loss or the norm is infinite or NaN.
        """
        batches, self.losses = self.losses, []
        *losses, fetched = fetch([*chain.from_iterable(batches), norm])
        where, of_step = f"of training step {global_step + 1}", iter(losses)
        for values in ([next(of_step) for _ in batch] for batch in batches):
            if not math.isfinite(sum(values)):
                raise FloatingPointError(f"The loss {where} is {sum(values)} (denoising steps: {values}). {ADVICE}")
        if not (norm_may_overflow or math.isfinite(fetched)):
            raise FloatingPointError(f"The gradient {where} has norm {fetched}. {ADVICE}")
        return fetched
