"""Positions, attention patterns and the token shift; pure functions of tensors.

Legend: B rows, P cached positions, L new positions, D hidden size, K = P + L. Rows may be padded on either side; blocks
are counted in each row's own positions, so padding never moves a block border.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_blocks_relay import BLOCK_ATTENTION, block_pattern
from .loading_backbones_relay import check_attention
from .prefix_relay import OtherCache, Prefix
from .versions_relay import as_cache_argument


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position of every token in its own row, 0 at padding before the text; (B, K) of 0/1 or bool -> (B, K) long."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def new_positions(attention_mask: Tensor | None, cached: int, length: int, device: torch.device) -> Tensor:
    """Positions of the `length` tokens behind `cached` ones: (B, L), or (1, L) if no (B, K) mask is given.

    Raises:
        ValueError: a mask covers another number of positions.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(cached, cached + length, device=device)[None]
    if attention_mask.shape[-1] != cached + length:
        raise ValueError(
            f"`attention_mask` covers {attention_mask.shape[-1]} positions, but there are {cached} cached and {length} "
            "new ones: pass the mask of both."
        )
    return positions_of(attention_mask)[:, -length:]


def block_attention_mask(
    config: Any,
    embeds: Tensor,
    attention_mask: Tensor | None,
    prefix: Prefix,
    block_size: int | None,
) -> Any:
    """The attention pattern of block diffusion: a position sees its own block and every block before it.

    Args:
        config: configuration of the backbone, which names the attention implementation.
        embeds: (B, L, D).
        attention_mask: (B, K) with 0 at padding; or a prepared 4-D mask, which is returned as it is; or None.
        prefix: the P positions before the new ones, a whole number of blocks.
        block_size: positions of a block; None = one block, in which every position sees every other.

    Returns:
        A mask in the form that the attention implementation takes; None = no mask, that is, full attention.

    Raises:
        ValueError: transformers makes no such mask for the attention implementation.
    """
    check_attention(config._attn_implementation)
    if attention_mask is not None and len(attention_mask.shape) == 4:
        return attention_mask
    cached, length = prefix.length, embeds.shape[1]
    # One block of new tokens sees the whole prefix and itself. Without padding, positions are columns.
    is_one_block = (
        block_size is None
        or prefix.is_one_block
        or (attention_mask is None and cached // block_size == (cached + length - 1) // block_size)
    )
    is_aligned = prefix.is_aligned or (attention_mask is None and not isinstance(prefix, OtherCache))
    if config._attn_implementation == BLOCK_ATTENTION and is_aligned:
        if is_one_block:
            return block_pattern(config, embeds, attention_mask, prefix, length)
        # With gradients, a GPU would launch more kernels for many small blocks than it saves.
        is_quick = embeds.device.type == "cpu" or not torch.is_grad_enabled()
        if is_quick and cached % block_size == 0 and block_size > 1:
            return block_pattern(config, embeds, attention_mask, prefix, block_size)
    if is_one_block and attention_mask is None:
        return None
    if is_one_block:
        return create_bidirectional_mask(config, embeds, attention_mask, **as_cache_argument(prefix))
    if attention_mask is None:
        blocks = torch.arange(cached + length, device=embeds.device)[None].expand(embeds.shape[0], -1) // block_size
    else:
        blocks = positions_of(attention_mask) // block_size
    # Not transformers' causal masks: they are bidirectional where the configuration says `is_causal=False`.
    return create_bidirectional_mask(
        config, embeds, attention_mask, **as_cache_argument(prefix), and_mask_function=_no_later_block(blocks)
    )


def _no_later_block(blocks: Tensor) -> Callable[..., Tensor]:
    """Mask function of transformers that hides every block behind a position's own; (B, K) block of every position."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return blocks[row, key] <= blocks[row, query]

    return sees


def full_attention(embeds: Tensor) -> Tensor:
    """A mask, (1, 1, 0, 0), that means "no mask" inside a backbone, which would replace None by a causal mask."""
    return embeds.new_empty(1, 1, 0, 0)


def attend_without_causality(backbone: nn.Module) -> None:
    """Makes the layers of a backbone follow the given mask alone; `full_attention` means that there is none.

    The layers keep this setting. The argument `is_causal=False` of a backbone's forward would be written to its
    configuration for the length of the forward, where other threads read and restore it.
    """
    for module in backbone.modules():
        # Kernels read it when there is no mask; a module without it counts as causal.
        vars(module)["is_causal"] = False
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(_drop_full_attention, with_kwargs=True)


def _drop_full_attention(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def kept(value: Any) -> Any:
        return None if isinstance(value, Tensor) and value.shape == (1, 1, 0, 0) else value

    return tuple(kept(value) for value in args), {name: kept(value) for name, value in kwargs.items()}


def align_to_positions(
    raw: Tensor, position_ids: Tensor, before: Tensor | None = None, takes_before: Tensor | None = None
) -> Tensor:
    """Turns the outputs of a token-shift model into position-aligned ones: entry i is what position i - 1 produced.

    Args:
        raw: (B, L, D) outputs in the order of the network.
        position_ids: (B or 1, L). Position 0 has nothing before it and keeps its own output, as in Fast-dLLM v2.
        before: (B, 1 or L, D) outputs of the predecessors that are not in the column before, for instance because
            they are cached. None: positions with such a predecessor keep their own output.
        takes_before: (B, L) bool, positions that use `before` although their predecessor is in the column before.

    Returns:
        (B, L, D).
    """
    follows = F.pad(position_ids[:, 1:] == position_ids[:, :-1] + 1, (1, 0))  # (B or 1, L)
    if takes_before is not None:
        follows = follows & ~takes_before
    elsewhere = raw if before is None else torch.where((position_ids == 0)[..., None], raw, before.to(raw.dtype))
    return torch.where(follows[..., None], F.pad(raw[:, :-1], (0, 0, 1, 0)), elsewhere)
