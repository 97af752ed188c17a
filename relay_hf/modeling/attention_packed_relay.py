"""Attention of blocks side by side, each behind its own part of a text, in memory that grows with the length alone.

This is what training needs: a block sees itself and the text before it. A mask would have a row for every query; here a
block has one number, how many columns of the text it sees, or two, if its row holds several texts. Blocks are computed
a few at a time, and again in the backward pass, where the gradients of keys and values are added up in place.

Legend: n rows, L queries of a row, J blocks of S positions among them, K >= L keys, the last L of which are those of
the queries; c queries that are computed at once.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Queries that are computed at once, if a block has fewer: a call for each block would cost more than a mask.
CHUNK = 64


def packed_pattern(stops: Tensor, size: int, starts: Tensor | None = None) -> Tensor:
    """What `attend_packed` takes for a mask, small enough to be handed through the layers of a model.

    Args:
        stops: (n or 1, J) long, where what each block sees of the text ends: before all of its own columns, or
            behind them; then it is the same for all blocks with one start.
        size: S.
        starts: (n or 1, J) long, the first column that each block sees; None = the first of the row.

    Returns:
        (n or 1, 1 or 2, J, S) long, alike along S.
    """
    bounds = stops[:, None] if starts is None else torch.stack(torch.broadcast_tensors(stops, starts), dim=1)
    return bounds[..., None].expand(-1, -1, -1, size)


def dense_mask(pattern: Tensor, length: int, total: int) -> Tensor:
    """The same as a mask, (n or 1, 1, L, K) bool, for a whole pass or for what `_pieces` takes of one.

    Args:
        pattern: of `packed_pattern`.
        length: L, of whole blocks.
        total: K.
    """
    size, device = pattern.shape[3], pattern.device
    # (n or 1, L, 1) each: stops and, if given, starts.
    bounds = [part[..., :1].repeat_interleave(size, dim=1, output_size=length) for part in pattern.unbind(1)]
    block, key = torch.arange(length, device=device) // size, torch.arange(total, device=device)
    own = F.pad(block[:, None] == block, (total - length, 0))  # (L, K)
    seen = key < bounds[0]
    if len(bounds) > 1:
        seen &= key >= bounds[1]
    return (own | seen)[:, None]


def attend_packed(query: Tensor, key: Tensor, value: Tensor, pattern: Tensor, scaling: float | None) -> Tensor:
    """Attention of packed blocks; its only gradients are those of queries, keys and values.

    Args:
        query: (n, heads, L, width), L a multiple of S.
        key: (n, key heads, K, width).
        value: likewise.
        pattern: of `packed_pattern`, on the CPU, where reading it waits for nothing.
        scaling: factor of the scores; None = 1 / sqrt(width).

    Returns:
        (n, heads, L, width).
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # As autocast does for attention; inside the function below, it would act on the forward pass only.
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    with torch.autocast(device, enabled=False):
        return _Packed.apply(query, key, value, pattern, scaling)


class _Piece(NamedTuple):
    """What is computed at once.

    Args:
        rows: of all tensors.
        queries: c of them.
        runs: columns of the keys that they see, one or two runs.
        mask: (n or 1, 1, c, columns of `runs`) bool; None = they see all of them.
    """

    rows: slice
    queries: slice
    runs: list[slice]
    mask: Tensor | None

    def keys_of(self, states: Tensor) -> Tensor:
        parts = [states[self.rows, :, run] for run in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pattern: Tensor, scaling: float | None) -> Tensor:
        ctx.save_for_backward(query, key, value, pattern)
        ctx.scaling = scaling
        output = query.new_empty(*query.shape[:3], value.shape[3])
        for piece in _pieces(pattern, query.shape[2], key.shape[2]):
            part = query[piece.rows, :, piece.queries]
            output[piece.rows, :, piece.queries] = attend_by_key_heads(
                part, piece.keys_of(key), piece.keys_of(value), piece.mask, scaling
            )
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, pattern = ctx.saved_tensors
        for_query = torch.empty_like(query)
        # Sums over blocks, which half precision would round one by one.
        at_least_single = torch.promote_types(key.dtype, torch.float32)
        for_key, for_value = (torch.zeros_like(t, dtype=at_least_single) for t in (key, value))
        for piece in _pieces(pattern, query.shape[2], key.shape[2]):
            rows, queries = piece.rows, piece.queries
            parts = query[rows, :, queries], piece.keys_of(key), piece.keys_of(value)
            query_leaf, key_leaf, value_leaf = leaves = [part.detach().requires_grad_() for part in parts]
            with torch.enable_grad():
                output = attend_by_key_heads(query_leaf, key_leaf, value_leaf, piece.mask, ctx.scaling)
            for_query[rows, :, queries], *others = torch.autograd.grad(output, leaves, gradient[rows, :, queries])
            for total, part in zip((for_key, for_value), others, strict=True):
                lengths = [run.stop - run.start for run in piece.runs]
                for run, share in zip(piece.runs, part.split(lengths, dim=2), strict=True):
                    total[rows, :, run] += share
        return for_query, for_key.to(key.dtype), for_value.to(value.dtype), None, None


def _pieces(pattern: Tensor, length: int, total: int) -> Iterator[_Piece]:
    """The pieces of a pass over L queries and K keys."""
    size = pattern.shape[3]
    for rows, blocks in _groups(pattern[..., 0], max(CHUNK // size, 1)):
        stops = pattern[rows, :1, blocks]  # (n or 1, 1, blocks, S)
        least, seen = int(stops.min()), int(stops.max())
        begin = int(pattern[rows, 1, blocks].min()) if pattern.shape[1] > 1 else 0
        queries = slice(blocks.start * size, blocks.stop * size)
        own = slice(total - length + queries.start, total - length + queries.stop)
        if least >= own.stop:  # their own columns are part of what they see of the text
            yield _Piece(rows, queries, [slice(begin, seen)], None)
            continue
        runs = [slice(begin, own.stop)] if seen == own.start else [slice(begin, seen), own]
        is_alike = blocks.stop - blocks.start == 1 and least == seen
        count = queries.stop - queries.start
        yield _Piece(rows, queries, runs, None if is_alike else dense_mask(stops - begin, count, seen - begin + count))


def _groups(bounds: Tensor, step: int) -> Iterator[tuple[slice, slice]]:
    """Which rows and blocks are computed at once: of all rows or, if these hold several texts, of one text.

    Args:
        bounds: (n or 1, 1 or 2, J), of `packed_pattern`.
        step: most blocks at once, unless all see the same.
    """
    if bounds.shape[1] == 1:
        for first in range(0, bounds.shape[2], step):
            yield slice(None), slice(first, min(first + step, bounds.shape[2]))
        return
    for row, (stops, starts) in enumerate(bounds.tolist()):
        for _, same_start in groupby(range(len(starts)), key=starts.__getitem__):
            text = list(same_start)
            end = text[-1] + 1
            at_once = len(text) if stops[text[0]] == stops[text[-1]] else step
            for first in range(text[0], end, at_once):
                yield slice(row, row + 1), slice(first, min(first + at_once, end))


def attend_by_key_heads(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float = 0.0
) -> Tensor:
    """SDPA in which heads that share keys become more queries of one head.

    So keys are not copied for each head, which SDPA would otherwise need with a mask: its fast kernels do not know both
    masks and shared keys.

    Args:
        query: (n, heads, c, width).
        key: (n, key heads, K, width).
        value: likewise.
        mask: (n or 1, 1, 1 or c, K), or None.
        scaling: factor of the scores; None = 1 / sqrt(width).
        dropout: share of the weights to drop.

    Returns:
        (n, heads, c, width).
    """
    heads = (key.shape[1], query.shape[1] // key.shape[1])
    folded = query.unflatten(1, heads).flatten(2, 3)
    if mask is not None and mask.shape[2] > 1 and heads[1] > 1:
        mask = mask.repeat(1, 1, heads[1], 1)
    output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return output.unflatten(2, (heads[1], query.shape[2])).flatten(1, 2)
