"""K denoising steps on training text, with ground truth revealed where the policy would reveal (teacher forcing).

How a step is computed is `denoiser.py`'s business.

Legend: B rows, L positions, D hidden size, V vocabulary, N masked positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..modeling import RelayConfig
from ..modeling.reveal_relay import UnmaskingPolicy
from .denoiser import make_denoiser
from .rows import RolloutRows

Carry = Literal["relay", "relay_sg", "rollout"]


@dataclass(frozen=True)
class RolloutResult:
    """What K steps gave.

    Args:
        loss: scalar, sum of the step losses.
        step_losses: K detached scalars, each the mean cross-entropy over all positions masked in that step.
        step_masked: K counts of masked positions before the step.
        step_reveals: K bool tensors (B, L), positions revealed after the step.
        rows: the rows after the last reveal, state detached.
    """

    loss: Tensor
    step_losses: list[Tensor]
    step_masked: list[Tensor]
    step_reveals: list[Tensor]
    rows: RolloutRows


def run_rollout(
    model: Callable[..., Any],
    config: RelayConfig,
    rows: RolloutRows,
    policies: list[UnmaskingPolicy],
    carry: Carry,
) -> RolloutResult:
    """Algorithm 1 of arXiv 2605.22967: one window of K = `len(policies)` steps.

    Args:
        model: a `RelayForMaskedDiffusion`, possibly wrapped (PEFT, DDP).
        config: its configuration.
        rows: where to start.
        policies: the reveal rule of each step.
        carry: `"relay"` lets gradients flow through the state, `"relay_sg"` cuts them between steps, `"rollout"`
            carries no state.
    """
    mask_token_id: int = config.mask_token_id
    denoiser = make_denoiser(model, config, rows)
    state = None if carry == "rollout" else rows.relay_state
    loss = torch.zeros((), device=rows.clean_ids.device)
    step_losses, step_masked, step_reveals = [], [], []
    for policy in policies:
        masked = rows.masked(mask_token_id)
        token_losses, confidence, next_state = denoiser.step(rows, state)
        step_loss = mean_loss(token_losses)
        loss = loss + step_loss
        reveal = _reveal(confidence, masked, policy, config)
        step_losses.append(step_loss.detach())
        step_masked.append(masked.sum())
        step_reveals.append(reveal)
        rows = replace(rows, noisy_ids=torch.where(reveal, rows.clean_ids, rows.noisy_ids))
        if carry != "rollout":
            state = next_state.detach() if carry == "relay_sg" else next_state
            rows = replace(rows, has_state=torch.ones_like(rows.has_state))
    if state is not None:
        rows = replace(rows, relay_state=state.detach().float())
    return RolloutResult(loss, step_losses, step_masked, step_reveals, rows)


def mean_loss(token_losses: Tensor) -> Tensor:
    """Mean of (N,) losses; zero, with a gradient of zero, if N = 0."""
    return token_losses.sum() / max(len(token_losses), 1)


@torch.no_grad()
def _reveal(probability: Tensor, masked: Tensor, policy: UnmaskingPolicy, config: RelayConfig) -> Tensor:
    """(B, L) bool, where the policy reveals, given the (N,) confidence at `masked`; it decides per block."""
    confidence = torch.zeros(masked.shape, device=masked.device).masked_scatter(masked, probability)
    rows, length = masked.shape
    width = config.block_size or length
    padding = (0, -length % width)
    groups = F.pad(masked, padding).view(-1, width)
    reveal = policy(F.pad(confidence, padding).view(-1, width), groups)
    return reveal.view(rows, -1)[:, :length]
