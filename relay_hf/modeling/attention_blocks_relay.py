"""The attention function "relay_blocks": no mask has a row for every query, because a block sees one run of columns.

All positions of a block see the same columns: those from the row's first to the block's last. So what transformers
hands to the function as its mask is much smaller than a mask, in one of three forms:

- **Columns**, 0 where they are seen and -inf elsewhere: (n, 1, 1, K) for all queries; or (n or 1, 1, S, K or 0), alike
  along S, where the queries are blocks of S positions and no block sees a later one; with 0 columns nothing else is
  hidden. Computed by SDPA.
- **Runs**, int32, (4, n + 1, J, S), alike along S: for each row and each of its J blocks, the block's first query, the
  row of the memory that holds its keys, the first key, and how many keys follow. Computed by torch's variable-length
  attention, over the memory of all rows and without a copy of it. Needs CUDA and half precision; has no gradient.
- **Packed**, int64: what `attention_packed_relay` takes, for blocks that see a text each of its own length. Training
  makes it on CPUs.

Any other mask, and none, is for transformers' "sdpa". Nothing here waits for the device.

Legend: n rows of a forward, L positions of a row, J blocks of S positions among them (the last may be shorter), K keys.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from .attention_packed_relay import attend_by_key_heads, attend_packed, dense_mask
from .prefix_relay import Prefix

BLOCK_ATTENTION = "relay_blocks"
SDPA = "sdpa"
# Queries that SDPA gets at once, if a block has fewer: a call for each would cost more than a mask of so many rows.
CHUNK = 32


def block_pattern(config: Any, embeds: Tensor, visible: Tensor | None, prefix: Prefix, size: int) -> Tensor | None:
    """What `attend_in_blocks` takes for a mask.

    Args:
        config: configuration of the backbone.
        embeds: (n, L, D) the new positions, of which only shape, device and dtype matter.
        visible: (n, K) bool or 0/1, one run of True in each row; None = nothing is hidden.
        prefix: the positions before the new ones, a whole number of blocks; told if it is to show its whole memory.
        size: S.

    Returns:
        Columns or runs, or None if every query sees every key.
    """
    length = embeds.shape[1]
    if takes_runs(config, embeds):
        rows = prefix.rows if prefix.is_in_place else None
        if visible is None and rows is None and size >= length:
            return None
        prefix.shows_memory = prefix.is_in_place
        total, _ = prefix.get_mask_sizes(length, 0)
        return _runs(embeds, visible, rows, total, size)
    if visible is None:
        return None if size >= length else embeds.new_empty(1, 1, size, 0)
    # Not bool, which SDPA would turn into these numbers again in every layer.
    columns = embeds.new_zeros(visible.shape).masked_fill(visible.logical_not(), -torch.inf)
    return columns[:, None, None].expand(-1, -1, 1 if size >= length else size, -1)


def takes_runs(config: Any, embeds: Tensor) -> bool:
    """Whether variable-length attention can compute a forward over these embeddings."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        embeds.is_cuda
        and embeds.dtype in (torch.float16, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and getattr(config, "v_head_dim", width) == width
        and width % 8 == 0
        and width <= 256
    )


def _runs(embeds: Tensor, visible: Tensor | None, rows: Tensor | None, total: int, size: int) -> Tensor:
    """(4, n + 1, J, S) int32; the row behind the last one only says where that ends.

    Args:
        embeds: as above, as is `visible`.
        rows: (n,) rows of the memory; None = n in their order.
        total: K.
        size: S.
    """
    count, length = embeds.shape[:2]
    row = torch.arange(count + 1, device=embeds.device)[:, None]  # (n + 1, 1)
    queries = torch.arange(0, length, size, device=embeds.device)  # (J,)
    stop = (total - length + size + queries).clamp(max=total)  # (J,) behind the last column that a block may see
    memory = row if rows is None else F.pad(rows, (0, 1))[:, None]
    first = torch.zeros_like(row)
    if visible is not None:
        seen = F.pad(visible.int(), (0, 0, 0, 1))
        first = seen.argmax(-1, keepdim=True)
        stop = stop.minimum(first + seen.sum(-1, keepdim=True))
    runs = [row * length + queries, memory, first, (stop - first).clamp(min=0)]
    runs = [part.expand(count + 1, len(queries)) for part in runs]
    return torch.stack(runs).int()[..., None].expand(-1, -1, -1, min(size, length))


def attend_in_blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers' models call.

    Args:
        module: the attention layer.
        query: (n, heads, L, width).
        key: (n, key heads, K, width); with runs, those of all rows of the memory.
        value: likewise.
        attention_mask: columns, runs, packed, any mask of "sdpa", or None.
        scaling: factor of the scores; None = 1 / sqrt(width).
        dropout: share of the weights to drop.
        kwargs: what else the layer passes; as in "sdpa", most of it is for other functions.

    Returns:
        (n, L, heads, width), and no weights.

    Raises:
        ValueError: the layer asks for a cap on the scores, as in "sdpa".
    """
    mask, length = attention_mask, query.shape[2]
    if mask is not None and mask.dtype == torch.int32:
        return _attend_to_runs(query, key, value, mask, scaling), None
    if mask is not None and mask.dtype == torch.int64:
        if not dropout and kwargs.get("softcap") is None:
            return attend_packed(query, key, value, mask, scaling).transpose(1, 2), None
        mask = dense_mask(mask, length, key.shape[2])
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)  # another one than that of the embeddings under autocast
    is_columns = mask is not None and mask.shape[1] == 1 and (mask.shape[2] == 1 or mask.shape[2] < length)
    if is_columns and mask.shape[2] > 1 and torch.compiler.is_compiling():
        # A loop would make another graph for every number of blocks.
        mask, is_columns = _columns(mask, length, key.shape[2]), False
    if not is_columns or kwargs.get("softcap") is not None:
        return AttentionInterface()[SDPA](module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    step, outputs = length, []
    if mask.shape[2] > 1:
        step = max(CHUNK // mask.shape[2], 1) * mask.shape[2]
    for begin in range(0, length, step):
        chunk = query[:, :, begin : begin + step]
        seen = key.shape[2] - max(length - begin - step, 0)  # columns up to the end of the chunk
        columns = _columns(mask, chunk.shape[2], seen)
        keys, values = key[:, :, :seen], value[:, :, :seen]
        outputs.append(attend_by_key_heads(chunk, keys, values, columns, scaling, dropout).transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _columns(mask: Tensor, length: int, seen: int) -> Tensor | None:
    """The mask of `length` queries at the end of `seen` columns, (n or 1, 1, 1 or L, seen); None = they see all.

    Args:
        mask: (n or 1, 1, 1 or S, >= seen or 0), as above.
        length: of one block, or of several that begin with the first query.
        seen: number of columns.
    """
    size, columns = mask.shape[2], mask[:, :, :1, :seen] if mask.shape[3] else None
    if size == 1 or size >= length:
        return columns
    query = torch.arange(length, device=mask.device)
    end = seen - length + (query // size + 1) * size  # of each query's block
    is_later = (torch.arange(seen, device=mask.device) >= end[:, None])[None, None]
    return (mask.new_zeros(1, 1, 1, seen) if columns is None else columns).masked_fill(is_later, -torch.inf)


def _attend_to_runs(query: Tensor, key: Tensor, value: Tensor, runs: Tensor, scaling: float | None) -> Tensor:
    """(n, L, heads, width)"""
    rows, heads, length, _ = query.shape
    count = rows * runs.shape[2]
    first_query, row, first_key, number = (part[..., 0].flatten()[: count + 1] for part in runs)
    output: Any = varlen_attn(
        _by_token(query),
        _by_token(key),
        _by_token(value),
        first_query,
        # Where each block's keys begin. They end after `number`, so blocks may overlap, and in any order.
        torch.add(first_key, row, alpha=key.shape[2]),
        runs.shape[3],
        key.shape[2],
        scale=scaling,
        enable_gqa=heads != key.shape[1],
        seqused_k=number[:count],
    )
    return output.view(rows, length, heads, -1)


def _by_token(states: Tensor) -> Tensor:
    """(n, heads, K, width) -> (n * K, heads, width), a view if the memory is laid out in this order."""
    return states.transpose(1, 2).flatten(0, 1)


AttentionInterface.register(BLOCK_ATTENTION, attend_in_blocks)
AttentionMaskInterface.register(BLOCK_ATTENTION, AttentionMaskInterface()[SDPA])
