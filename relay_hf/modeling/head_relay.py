"""Scoring positions without ever holding their logits: the loss and the confidence of each, tile by tile.

With 151 936 tokens the logits of 800 positions take half a gigabyte, several times over in training. Training needs
only two numbers a position: the cross-entropy of its target, and the probability of its best token. Both are sums or
maxima over the vocabulary, which can be gathered from tiles of it (the "online softmax" of arXiv 1805.02867).

Whatever decides or is a loss reads fp32 logits, also of a bf16 or fp16 model: rounded to bf16, logits near 20 move a
probability by up to 6 %, and the two best tokens often tie.

Legend: B rows, L positions, N scored ones among them, D hidden size, V vocabulary.
"""

import functools
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
HALF = (torch.bfloat16, torch.float16)
# Positions whose logits are alive together, where a head has to be called for logits.
POSITIONS_AT_ONCE = 256


class RelayHead(nn.Linear):
    """Linear head that gives logits; or scores of targets, or the best tokens, without holding logits.

    All are calls of the module, so that libraries which gather or cast weights around a module's call see them.
    """

    def forward(
        self,
        input: Tensor,
        targets: Tensor | None = None,
        mask_token_id: int | None = None,
        deciding: bool = False,
        z_loss: float = 0.0,
    ) -> Any:
        """(..., D) -> (..., V) logits; with targets, (N, D) and (N,) -> what `score_positions` returns.

        With a mask token only, (N, D) -> what `best_tokens` returns; `deciding`: what `deciding_logits` returns.
        """
        if targets is not None:
            return score_positions(input, self.weight, targets, mask_token_id, z_loss)
        if mask_token_id is not None:
            return best_tokens(input, self.weight, mask_token_id)
        return deciding_logits(input, self.weight) if deciding else super().forward(input)


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


def score(
    head: nn.Module, hidden: Tensor, targets: Tensor, mask_token_id: int, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What `score_positions` returns, for any head: any but a plain `RelayHead` is called for logits.

    Args:
        head: (N, D) -> (N, V) logits.
        hidden: (N, D).
        targets: (N,) tokens.
        mask_token_id: never the best token, but counted in the normalisation.
        z_loss: as in `score_positions`.
    """
    if is_plain(head, RelayHead):
        return head(hidden, targets, mask_token_id, z_loss=z_loss)

    def score_some(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden).float()
        with torch.no_grad():
            confidence, _ = best_token(logits.clone(), mask_token_id)  # a copy, because it is overwritten
        losses = F.cross_entropy(logits, targets, reduction="none")
        return losses + z_loss * logits.logsumexp(-1) ** 2 if z_loss else losses, confidence

    parts = zip(hidden.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True)
    scores = [checkpoint(score_some, *part, use_reentrant=False) for part in parts]
    losses, confidences = zip(*scores, strict=True)
    return torch.cat(losses), torch.cat(confidences)


def score_positions(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask_token_id: int, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the targets and probability of the best token, for (N, D) inputs of a linear head.

    Args:
        hidden: (N, D).
        weight: (V, D) of the head, which has no bias.
        targets: (N,) tokens.
        mask_token_id: never the best token, but counted in the normalisation.
        z_loss: how much of the squared logarithm of the normalisation, log(sum(exp(logits)))^2, each loss includes; it
            keeps logits from drifting (PaLM, arXiv 2204.02311).

    Returns:
        (N,) fp32 losses, differentiable with respect to `hidden` and `weight`, and (N,) fp32 probabilities.
    """
    hidden = _as_autocast(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return _Scores.apply(hidden, weight, targets, mask_token_id, z_loss)


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
    hidden = _as_autocast(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        masked = _products(hidden, weight[mask_token_id][None])[:, 0]
        tiles = [_best_of_tile(hidden, weight, tile, mask_token_id) for tile in _tiles(hidden, weight)]
    bests, tokens, totals = zip(*tiles, strict=True)
    best, total = _merged(bests, totals)
    token = tokens[0]
    if len(tokens) > 1:
        token = torch.stack(tokens).gather(0, torch.stack(bests).argmax(0)[None])[0]
    return (1.0 / (total + (masked - best).exp())).float(), token


def _best_of_tile(hidden: Tensor, weight: Tensor, tile: slice, mask_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) best logit of a tile, [MASK] apart, its token, and the sum of exp(logit - best) over the tile."""
    logits = _products(hidden, weight[tile])
    _hide_mask(logits, tile, mask_token_id)
    best, column = _maximum(logits)
    return best, column + tile.start, _exp_of(logits, best).sum(-1)


def _merged(bests: tuple[Tensor, ...], totals: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """(N,) best logit of all tiles, and sum of exp(logit - best) over them, from the same of each."""
    if len(bests) == 1:
        return bests[0], totals[0]
    stacked = torch.stack(bests)  # (tiles, N)
    best = stacked.amax(0)
    return best, (torch.stack(totals) * (stacked - best).exp_()).sum(0)


@torch.no_grad()
def deciding_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(N, D) inputs of a linear head, (V, D) weight -> (N, V) logits, fp32 where the inputs have fewer digits."""
    hidden = _as_autocast(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        if not _is_widened(hidden):
            return _products(hidden, weight)
        return torch.cat([_products(hidden, weight[tile]) for tile in _tiles(hidden, weight)], dim=-1)


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
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, mask_token_id: int, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        tiles, parts = _tiles(hidden, weight), []
        columns, is_inside = _places(targets, tiles)
        for tile, column in zip(tiles, columns, strict=True):
            logits = _products(hidden, weight[tile])
            chosen = logits.gather(-1, column)[:, 0]
            _hide_mask(logits, tile, mask_token_id)
            best = logits.amax(-1)
            parts.append((chosen, best, _exp_of(logits, best).sum(-1)))
        of_targets, bests, totals = zip(*parts, strict=True)
        best, total = _merged(bests, totals)
        masked = _products(hidden, weight[mask_token_id][None])[:, 0]
        total = torch.logaddexp(best + total.log(), masked)
        ctx.save_for_backward(hidden, weight, total, columns, is_inside)
        confidence = (best - total).exp().float()
        ctx.mark_non_differentiable(confidence)
        ctx.z_loss = z_loss
        losses = total - torch.stack(of_targets).where(is_inside, 0.0).sum(0)
        return (losses + z_loss * total**2 if z_loss else losses).float(), confidence

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, total, columns, is_inside = ctx.saved_tensors
        if len(hidden) == 0:
            # Zeros that take no memory. Not None: processes that train together must have the same gradients to send.
            return torch.zeros_like(hidden), weight.new_zeros(()).expand_as(weight), None, None, None
        for_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        for_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        marks = -is_inside.to(total.dtype)[..., None]  # (tiles, N, 1)
        for tile, column, mark in zip(_tiles(hidden, weight), columns, marks, strict=True):
            # d loss / d logits = (1 + 2 z log Z) softmax - one-hot.
            slope = _exp_of(_products(hidden, weight[tile]), total)
            if ctx.z_loss:
                slope.mul_(1 + 2 * ctx.z_loss * total[:, None])
            slope = slope.scatter_add_(-1, column, mark).mul_(gradient[:, None]).to(hidden.dtype)
            if for_hidden is not None:
                for_hidden += _products(slope, weight[tile].T)
            if for_weight is not None:
                for_weight[tile] = _products(slope.T, hidden.T)
        return None if for_hidden is None else for_hidden.to(hidden.dtype), for_weight, None, None, None


def _places(targets: Tensor, tiles: list[slice]) -> tuple[Tensor, Tensor]:
    """(tiles, N, 1) column of each target in each tile, and (tiles, N) bool; where it is False, any column."""
    width, last = tiles[0].stop, tiles[-1].stop - tiles[-1].start
    columns = targets - width * torch.arange(len(tiles), device=targets.device)[:, None]
    is_inside = (columns >= 0) & (columns < width)
    columns.clamp_(0, width - 1)
    columns[-1].clamp_(max=last - 1)
    return columns[..., None], is_inside


def _hide_mask(logits: Tensor, tile: slice, mask_token_id: int) -> None:
    """Keeps [MASK] from being the best token of a tile's logits."""
    if tile.start <= mask_token_id < tile.stop:
        # Not -inf, because the tile may hold nothing else.
        logits[:, mask_token_id - tile.start] = torch.finfo(logits.dtype).min


def _exp_of(logits: Tensor, offset: Tensor) -> Tensor:
    """exp(logits - offset), in place: (N, V) and (N,)."""
    logits.sub_(offset[:, None])
    if logits.device.type == "cpu":
        # Numbers so small that they vanish in any sum take a processor ten times longer.
        logits.clamp_(min=-80.0)
    return logits.exp_()


def _as_autocast(hidden: Tensor) -> Tensor:
    """Inputs in the dtype that autocast gives a linear layer; the weight follows tile by tile.

    So autocast need not act inside, where it would act on the forward pass only; no cast weight is kept for the
    backward pass, and the gradient of an fp32 weight is not rounded.
    """
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def _products(left: Tensor, right: Tensor) -> Tensor:
    """(n, d) and (m, d) -> (n, m) products, at least fp32, with `right` in the dtype of `left`."""
    right = right.to(left.dtype)
    if _is_widened(left):
        return F.linear(left.float(), right.float())
    if left.dtype in HALF:
        return torch.mm(left, right.T, out_dtype=torch.float32)
    return F.linear(left, right)


def _is_widened(hidden: Tensor) -> bool:
    """Whether inputs and weights must become fp32 for products that are. On a CPU without bf16 that is faster, too."""
    return hidden.dtype in HALF and not multiplies_into_single(hidden.device.type)


@torch.compiler.assume_constant_result
@functools.cache
def multiplies_into_single(device: str) -> bool:
    """Whether a kind of device multiplies matrices of half precision into fp32; what can be known only by trying."""
    half = torch.zeros(1, 1, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(half, half, out_dtype=torch.float32)
    except (NotImplementedError, RuntimeError, TypeError):  # of a CPU; of another library; of an older torch
        return False
    return True


def _tiles(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Slices of the vocabulary, all of about one size; wide ones are whole segments, but for the last."""
    numbers = TILE_NUMBERS.get(hidden.device.type, TILE_NUMBERS_ELSEWHERE)
    vocabulary, columns = len(weight), len(hidden)
    if _is_widened(hidden):
        columns = max(hidden.shape)  # the tile's weights become fp32 numbers, too
    count = -(-vocabulary * columns // numbers) or 1
    width = -(-vocabulary // min(count, vocabulary))
    if width > SEGMENT:
        width = -(-width // SEGMENT) * SEGMENT
    return [slice(begin, min(begin + width, vocabulary)) for begin in range(0, vocabulary, width)]
