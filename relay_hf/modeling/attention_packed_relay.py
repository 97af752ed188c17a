"""Attention of blocks side by side, each behind its own part of a text, in memory that grows with the length alone.

This is what training needs: a block sees itself and the text before it. A mask would have a row for every query; here a
block has one number, how many columns of the text it sees. Blocks are computed a few at a time, and again in the
backward pass, where the gradients of keys and values are added up in place.

Legend: n rows, L queries of a row, J blocks of S positions among them, K >= L keys, the last L of which are those of
the queries; c queries that are computed at once.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Queries that are computed at once, if a block has fewer: a call for each block would cost more than a mask.
CHUNK = 64


def packed_pattern(first_columns: Tensor, size: int) -> Tensor:
    """What `attend_packed` takes for a mask, small enough to be handed through the layers of a model.

    Args:
        first_columns: (n or 1, J) long, columns of the text that each block sees, from the first one on.
        size: S.

    Returns:
        (n or 1, 1, J, S) long, alike along S.
    """
    return first_columns[:, None, :, None].expand(-1, -1, -1, size)


def dense_mask(pattern: Tensor, length: int, total: int) -> Tensor:
    """The same as a mask, (n or 1, 1, L, K) bool, for a whole pass or for what `_pieces` takes of one.

    Args:
        pattern: of `packed_pattern`.
        length: L, of whole blocks.
        total: K.
    """
    size, device = pattern.shape[3], pattern.device
    seen = pattern[:, 0, :, 0].repeat_interleave(size, dim=1, output_size=length)  # (n or 1, L)
    block, key = torch.arange(length, device=device) // size, torch.arange(total, device=device)
    own = F.pad(block[:, None] == block, (total - length, 0))  # (L, K)
    return (own | (key < seen[..., None]))[:, None]


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


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pattern: Tensor, scaling: float | None) -> Tensor:
        ctx.save_for_backward(query, key, value, pattern)
        ctx.scaling = scaling
        parts = [
            attend_by_key_heads(query[:, :, queries], _keys(key, *columns), _keys(value, *columns), mask, scaling)
            for queries, columns, mask in _pieces(pattern, query.shape[2], key.shape[2])
        ]
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, pattern = ctx.saved_tensors
        for_query = torch.empty_like(query)
        # Sums over blocks, which half precision would round one by one.
        for_key, for_value = (torch.zeros_like(t, dtype=torch.float32) for t in (key, value))
        for queries, columns, mask in _pieces(pattern, query.shape[2], key.shape[2]):
            parts = query[:, :, queries], _keys(key, *columns), _keys(value, *columns)
            query_leaf, key_leaf, value_leaf = leaves = [part.detach().requires_grad_() for part in parts]
            with torch.enable_grad():
                output = attend_by_key_heads(query_leaf, key_leaf, value_leaf, mask, ctx.scaling)
            for_query[:, :, queries], *others = torch.autograd.grad(output, leaves, gradient[:, :, queries])
            for total, part in zip((for_key, for_value), others, strict=True):
                text, own = columns
                total[:, :, text] += part[:, :, : text.stop]
                total[:, :, own] += part[:, :, text.stop :]
        return for_query, for_key.to(key.dtype), for_value.to(value.dtype), None, None


def _pieces(pattern: Tensor, length: int, total: int) -> Iterator[tuple[slice, tuple[slice, slice], Tensor | None]]:
    """For each c queries: which; columns of the text, and their own; a mask of both, or None = all are seen."""
    size = pattern.shape[3]
    step = max(CHUNK // size, 1)
    for first, part in enumerate(pattern.split(step, dim=2)):
        begin = first * step * size
        queries = slice(begin, begin + part.shape[2] * size)
        columns = slice(0, int(part.max())), slice(total - length + queries.start, total - length + queries.stop)
        is_alike = part.shape[2] == 1 and int(part.min()) == columns[0].stop
        count = queries.stop - queries.start
        yield queries, columns, None if is_alike else dense_mask(part, count, columns[0].stop + count)


def _keys(states: Tensor, text: slice, own: slice) -> Tensor:
    if text.stop == own.start:
        return states[:, :, : own.stop]
    return torch.cat([states[:, :, text], states[:, :, own]], dim=2)


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
