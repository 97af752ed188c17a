"""Scoring positions without ever holding their logits: the loss and the confidence of each, tile by tile.

With 151 936 tokens the logits of 800 positions take half a gigabyte, several times over in training. Training needs
only two numbers a position: the cross-entropy of its target, and the probability of its best token. Both are sums or
maxima over the vocabulary, which can be gathered from tiles of it (the "online softmax" of arXiv 1805.02867).

Legend: B rows, L positions, N scored ones among them, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .versions_relay import slice_logits_to_keep

# Logits of one tile: on a CPU they should stay in its cache (measured: 2**19 to 2**22 equal, half as fast beyond);
# an accelerator wants few, large matrix products.
TILE_NUMBERS = {"cpu": 2**20}
TILE_NUMBERS_ELSEWHERE = 2**26
# Logits of which a CPU finds the largest at once.
SEGMENT = 64
# Positions whose logits are alive together, where a head has to be called for logits.
POSITIONS_AT_ONCE = 256


class RelayHead(nn.Linear):
    """Linear head that gives logits; or scores of targets, or the best tokens, without holding logits.

    All three are calls of the module, so that libraries which gather or cast weights around a module's call see them.
    """

    def forward(self, input: Tensor, targets: Tensor | None = None, mask_token_id: int | None = None) -> Any:
        """(..., D) -> (..., V) logits; with targets, (N, D) and (N,) -> what `score_positions` returns.

        With a mask token only, (N, D) -> what `best_tokens` returns.
        """
        if targets is not None:
            return score_positions(input, self.weight, targets, mask_token_id)
        if mask_token_id is not None:
            return best_tokens(input, self.weight, mask_token_id)
        return super().forward(input)


def kept_positions(tensor: Tensor, logits_to_keep: int | Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """(B, L, X) -> (N, X) or (B, n, X) at the positions that `logits_to_keep` of the model's `forward` selects."""
    if isinstance(logits_to_keep, tuple):
        return tensor[logits_to_keep]
    return slice_logits_to_keep(tensor, logits_to_keep)


def kept_labels(labels: Tensor, input_ids: Tensor, logits_to_keep: int | Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """(B, L) labels and tokens -> (N,) labels of the positions that `logits_to_keep` selects.

    Raises:
        ValueError: labels and tokens differ in shape, or all labels are -100.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"`labels` have shape {tuple(labels.shape)}, but `input_ids` {tuple(input_ids.shape)}: pass one label per "
            "position, -100 to ignore it."
        )
    kept = kept_positions(labels[..., None], logits_to_keep).flatten()
    if bool((kept == -100).all()):
        raise ValueError("All labels are -100, so there is nothing to learn: label at least one position.")
    return kept


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes nothing but what its weight says.

    An adapter in its place, a hook, another `forward` or a quantised weight computes something else. The hooks and the
    class of FSDP only gather weights.
    """
    gathers = isinstance(module, FSDPModule) and isinstance(module, kind)
    untouched = type(module) is kind and not module._forward_hooks and "forward" not in vars(module)
    return (gathers or untouched) and type(module.weight) in (nn.Parameter, Tensor, DTensor)


def token_table(embeddings: nn.Module) -> Tensor:
    """(V, D) embeddings of all tokens, as the module looks them up with its adapter, hook, scale or quantisation."""
    weight: Any = embeddings.weight
    if isinstance(weight, DTensor):
        # Not by calling the module, after which FSDP shards the weight again. Gemma's module scales the embeddings.
        return weight.full_tensor() * getattr(embeddings, "embed_scale", 1.0)
    if is_plain(embeddings, nn.Embedding):
        return weight
    return embeddings(torch.arange(len(weight), device=weight.device))


def score(head: nn.Module, hidden: Tensor, targets: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """What `score_positions` returns, for any head: any but a plain `RelayHead` is called for logits.

    Args:
        head: (N, D) -> (N, V) logits.
        hidden: (N, D).
        targets: (N,) tokens.
        mask_token_id: never the best token, but counted in the normalisation.
    """
    if is_plain(head, RelayHead):
        return head(hidden, targets, mask_token_id)

    def score_some(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden).float()
        with torch.no_grad():
            confidence, _ = best_token(logits.clone(), mask_token_id)  # a copy, because it is overwritten
        return F.cross_entropy(logits, targets, reduction="none"), confidence

    parts = zip(hidden.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True)
    scores = [checkpoint(score_some, *part, use_reentrant=False) for part in parts]
    losses, confidences = zip(*scores, strict=True)
    return torch.cat(losses), torch.cat(confidences)


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
        # As autocast does for a linear layer; inside the function below, it would act on the forward pass only.
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        return _Scores.apply(hidden, weight, targets, mask_token_id)


def best_token(scores: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """The most probable token that is not [MASK], and how probable it is among all tokens.

    Args:
        scores: (N, V) logits; the column of [MASK] is overwritten.
        mask_token_id: never chosen, but counted in the normalisation.

    Returns:
        (N,) fp32 probability and (N,) token id.
    """
    total = scores.float().logsumexp(-1)
    scores[:, mask_token_id] = -torch.inf
    best, token = scores.max(-1)
    return (best.float() - total).exp(), token


@torch.no_grad()
def best_tokens(hidden: Tensor, weight: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """What `best_token` returns, tile by tile: greedy decoding reads each logit once, in the processor's cache.

    Args:
        hidden: (N, D).
        weight: (V, D) of the head, which has no bias.
        mask_token_id: never chosen, but counted in the normalisation.

    Returns:
        (N,) fp32 probability and (N,) token id.
    """
    best = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)  # (N,) logit
    total, token = torch.zeros_like(best), torch.zeros_like(best, dtype=torch.long)
    masked = F.linear(hidden, weight[mask_token_id])  # (N,)
    for tile in _tiles(hidden, weight):
        logits = F.linear(hidden, weight[tile]).float()
        if tile.start <= mask_token_id < tile.stop:
            logits[:, mask_token_id - tile.start] = torch.finfo(
                logits.dtype
            ).min  # not -inf: the tile may hold nothing else
        best_of_tile, column = _maximum(logits)
        token = torch.where(best_of_tile > best, column + tile.start, token)
        before, best = best, torch.maximum(best, best_of_tile)
        # In place, as the tile is in the processor's cache. Clamped, because numbers so small that they vanish in the
        # sum (e^-80) take a processor ten times longer.
        share = logits.sub_(best[:, None]).clamp_(min=-80.0).exp_().sum(-1)
        total = total * (before - best).exp() + share
    return 1.0 / (total + (masked.float() - best).exp()), token


def _maximum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What `logits.max(-1)` returns, ten times as fast on a CPU, where an index slows down every comparison."""
    rows, width = logits.shape
    if logits.device.type != "cpu" or width % SEGMENT:
        return logits.max(-1)
    segments = logits.view(rows, width // SEGMENT, SEGMENT)
    best, number = segments.amax(-1).max(-1)  # (N,)
    inside = segments[torch.arange(rows), number].argmax(-1)
    return best, number * SEGMENT + inside


class _Scores(torch.autograd.Function):
    """Recomputes each tile's logits in the backward pass: one matrix product more, and no memory.

    Tiles cut the vocabulary, not the positions, so that each part of the weight's gradient is written just once.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
        total = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)  # (N,) log-sum-exp
        best, chosen = total.clone(), torch.zeros_like(total)  # (N,) logits
        for tile in _tiles(hidden, weight):
            logits = (hidden @ weight[tile].T).float()
            total = torch.logaddexp(total, logits.logsumexp(-1))
            column, is_inside = _columns(targets, tile)
            chosen += logits.gather(-1, column)[:, 0] * is_inside
            if tile.start <= mask_token_id < tile.stop:
                logits[:, mask_token_id - tile.start] = -torch.inf
            best = torch.maximum(best, logits.amax(-1))
        ctx.save_for_backward(hidden, weight, targets, total)
        confidence = (best - total).exp()
        ctx.mark_non_differentiable(confidence)
        return total - chosen, confidence

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, total = ctx.saved_tensors
        if len(hidden) == 0:
            # Zeros that take no memory. Not None: processes that train together must have the same gradients to send.
            return torch.zeros_like(hidden), weight.new_zeros(()).expand_as(weight), None, None
        for_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        for_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for tile in _tiles(hidden, weight):
            # d loss / d logits = softmax - one-hot.
            slope = (hidden @ weight[tile].T).float().sub_(total[:, None]).exp_()
            column, is_inside = _columns(targets, tile)
            slope.scatter_add_(-1, column, -is_inside[:, None])
            slope = slope.mul_(gradient[:, None]).to(hidden.dtype)
            if for_hidden is not None:
                for_hidden += slope @ weight[tile]
            if for_weight is not None:
                torch.mm(slope.T, hidden, out=for_weight[tile])
        return None if for_hidden is None else for_hidden.to(hidden.dtype), for_weight, None, None


def _columns(targets: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """(N, 1) column of each target in the tile, and (N,) 1.0; for targets outside of the tile, any column and 0.0."""
    columns = targets - tile.start
    is_inside = (columns >= 0) & (columns < tile.stop - tile.start)
    return columns.where(is_inside, 0)[:, None], is_inside.float()


def _tiles(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Slices of the vocabulary, all of about one size; wide ones are whole segments, but for the last."""
    numbers = TILE_NUMBERS.get(hidden.device.type, TILE_NUMBERS_ELSEWHERE)
    vocabulary = len(weight)
    count = -(-vocabulary * len(hidden) // numbers) or 1
    width = -(-vocabulary // min(count, vocabulary))
    if width > SEGMENT:
        width = -(-width // SEGMENT) * SEGMENT
    return [slice(begin, min(begin + width, vocabulary)) for begin in range(0, vocabulary, width)]
