"""Scoring positions without ever holding their logits: the loss and the confidence of each, chunk by chunk.

With 151 936 tokens the logits of 800 positions take half a gigabyte, several times over in training. Training needs
only two numbers a position: the cross-entropy of its target, and how probable its best token is.

Legend: N positions, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

# Logits of one chunk take about this many numbers; larger chunks gain nothing measurable on a CPU.
CHUNK_NUMBERS = 2**24


def score_positions(hidden: Tensor, weight: Tensor, targets: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the targets and probability of the best token, for (N, D) inputs of a linear head.

    Args:
        hidden: (N, D).
        weight: (V, D) of the head, which has no bias.
        targets: (N,) tokens.
        mask_token_id: never the best token, but counted in the normalisation.

    Returns:
        (N,) fp32 losses, differentiable with respect to `hidden` and `weight`, and (N,) fp32 probabilities.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        # What autocast does to a linear layer; inside the function below it would only see the forward pass.
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        return _Scores.apply(hidden, weight, targets, mask_token_id)


class _Scores(torch.autograd.Function):
    """Recomputes each chunk's logits in the backward pass: one matrix product more, and no memory."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
        total = hidden.new_empty(len(hidden), dtype=torch.float32)  # (N,) log-sum-exp
        best, chosen = torch.empty_like(total), torch.empty_like(total)  # (N,) logits
        for rows in _chunks(hidden, weight):
            logits = (hidden[rows] @ weight.T).float()
            total[rows] = logits.logsumexp(-1)
            chosen[rows] = logits.gather(-1, targets[rows, None])[:, 0]
            logits[:, mask_token_id] = -torch.inf
            best[rows] = logits.amax(-1)
        ctx.save_for_backward(hidden, weight, targets, total)
        confidence = (best - total).exp()
        ctx.mark_non_differentiable(confidence)
        return total - chosen, confidence

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, total = ctx.saved_tensors
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in _chunks(hidden, weight):
            # d loss / d logits = softmax - one-hot.
            slope = ((hidden[rows] @ weight.T).float() - total[rows, None]).exp_()
            slope.scatter_add_(-1, targets[rows, None], slope.new_full((len(slope), 1), -1.0))
            slope = slope.mul_(gradient[rows, None]).to(hidden.dtype)
            if for_hidden is not None:
                for_hidden[rows] = slope @ weight
            if for_weight is not None:
                for_weight += slope.T @ hidden[rows]
        return for_hidden, None if for_weight is None else for_weight.to(weight.dtype), None, None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(CHUNK_NUMBERS // len(weight), 1)
    return [slice(begin, begin + size) for begin in range(0, len(hidden), size)]
