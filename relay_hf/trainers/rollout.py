"""K denoising steps on training text, with ground truth revealed where the policy would reveal (teacher forcing).

This is the plain formulation: for block diffusion every step runs the doubled sequence [x_t ; x_0], in which a noisy
block sees itself and the clean blocks before it. Nothing outside this file knows how a step is computed.

Legend: B rows, L positions, D hidden size, V vocabulary, N masked positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask

from ..modeling import RelayConfig
from ..modeling.reveal_relay import UnmaskingPolicy, best_token

Carry = Literal["relay", "relay_sg", "rollout"]


@dataclass(frozen=True)
class RolloutRows:
    """Rows in the middle of being denoised; every tensor has the rows as first axis.

    Args:
        clean_ids: (B, L) the text.
        maskable: (B, L) bool, positions that are learned; the others are always visible.
        attention_mask: (B, L) bool, False at padding, which is on the right.
        noisy_ids: (B, L) the text with the positions that are still hidden replaced by [MASK].
        relay_state: (B, L, D) fp32, detached state of the last step, or None if the objective carries none.
        has_state: (B,) bool, False for rows that have not been denoised yet.
    """

    clean_ids: Tensor
    maskable: Tensor
    attention_mask: Tensor
    noisy_ids: Tensor
    relay_state: Tensor | None
    has_state: Tensor

    def masked(self, mask_token_id: int) -> Tensor:
        """(B, L) bool, positions that are still hidden."""
        return self.maskable & (self.noisy_ids == mask_token_id)


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
    attention = _attention(config, rows)
    state = None if carry == "rollout" else rows.relay_state
    loss = torch.zeros((), device=rows.clean_ids.device)
    step_losses, step_masked, step_reveals = [], [], []
    for policy in policies:
        masked = rows.masked(mask_token_id)
        logits, next_state = _denoise(model, config, rows, attention, masked, state)
        step_loss = masked_cross_entropy(logits, rows.clean_ids[masked])
        loss = loss + step_loss
        reveal = _reveal(logits, masked, policy, config)
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


def masked_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in fp32 of (N, V) logits against (N,) targets; zero, with a gradient of zero, if N = 0."""
    return F.cross_entropy(logits.float(), targets, reduction="sum") / max(len(targets), 1)


def denoise_once(model: Callable[..., Any], config: RelayConfig, rows: RolloutRows) -> Tensor:
    """(N, V) logits at the masked positions of `rows`, without any state: a step of plain masked diffusion."""
    masked = rows.masked(config.mask_token_id)
    return _denoise(model, config, rows, _attention(config, rows), masked, None)[0]


def _denoise(
    model: Callable[..., Any],
    config: RelayConfig,
    rows: RolloutRows,
    attention: dict[str, Any],
    masked: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One denoising step: (N, V) logits at the masked positions and the (B, L, D) state it leaves."""
    noisy_ids, length = rows.noisy_ids, rows.noisy_ids.shape[1]
    receives = None
    if state is not None:
        in_scope = torch.ones_like(masked) if config.relay_scope == "all" else noisy_ids == config.mask_token_id
        starts_empty = config.relay_initial_state == "none"
        receives = in_scope & rows.has_state[:, None] if starts_empty else in_scope
    if config.block_size is not None:
        # The clean half is committed text: no mask, no loss, no state.
        noisy_ids = torch.cat([noisy_ids, rows.clean_ids], dim=1)
        masked = F.pad(masked, (0, length))
        if state is not None:
            state, receives = F.pad(state, (0, 0, 0, length)), F.pad(receives, (0, length))
    output = model(
        input_ids=noisy_ids, relay_state=state, relay_mask=receives, logits_to_keep=masked, use_cache=False, **attention
    )
    next_state = output.relay_state[:, :length] if output.relay_state is not None else None
    return output.logits, next_state


def _attention(config: RelayConfig, rows: RolloutRows) -> dict[str, Any]:
    """Attention mask and positions of a step; the same for all steps of a rollout."""
    if config.block_size is None:
        return {"attention_mask": rows.attention_mask}
    rows_count, length = rows.clean_ids.shape
    position_ids = torch.arange(length, device=rows.clean_ids.device).repeat(2)  # (2L,)
    block, is_noisy = position_ids // config.block_size, torch.arange(2 * length, device=position_ids.device) < length

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same, before = block[key] == block[query], block[key] < block[query]
        noisy_key = is_noisy[query] & same
        clean_key = before | (same & ~is_noisy[query])
        return torch.where(is_noisy[key], noisy_key, clean_key)

    mask = create_bidirectional_mask(
        config.text_config,
        # Stands for the embeddings, of which only shape and device matter here.
        torch.empty(rows_count, 2 * length, 0, device=position_ids.device),
        rows.attention_mask.repeat(1, 2),
        and_mask_function=sees,
    )
    return {"attention_mask": mask, "position_ids": position_ids[None]}


@torch.no_grad()
def _reveal(logits: Tensor, masked: Tensor, policy: UnmaskingPolicy, config: RelayConfig) -> Tensor:
    """(B, L) bool, where the policy reveals; it decides per block."""
    probability, _ = best_token(logits.detach().clone(), config.mask_token_id)
    confidence = torch.zeros(masked.shape, device=masked.device).masked_scatter(masked, probability)
    rows, length = masked.shape
    width = config.block_size or length
    padding = (0, -length % width)
    groups = F.pad(masked, padding).view(-1, width)
    reveal = policy(F.pad(confidence, padding).view(-1, width), groups)
    return reveal.view(rows, -1)[:, :length]
