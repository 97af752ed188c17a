"""What each position of a pass sees of its row, in the form that the attention function takes; see `denoiser.py`.

Legend: B rows, L' columns of whole blocks, S positions of a block, A active blocks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from ...modeling import RelayConfig
from ...modeling.attention_blocks_relay import BLOCK_ATTENTION
from ...modeling.attention_packed_relay import dense_mask, packed_pattern
from ...modeling.prefix_relay import Prefix
from ...modeling.versions_relay import as_cache_argument
from .active_blocks import PackedBlocks


def pattern_of_texts(config: RelayConfig, starts: Tensor) -> Any:
    """Of whole-sequence models: a position sees all of its text, and no other.

    Args:
        config: the model's configuration.
        starts: (B, L) long, column at which the text of each position begins.
    """
    length = starts.shape[1]
    if config.text_config._attn_implementation == BLOCK_ATTENTION:
        stops = torch.searchsorted(starts, starts, right=True)
        return _for_device(packed_pattern(stops, 1, starts), length, length)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return starts[row, key] == starts[row, query]

    return _mask(config, starts, None, Prefix([], 0), sees)


class BlockPatterns:
    """Of block diffusion: a block sees itself, and the clean text before it that is of its own text.

    Args:
        config: the model's configuration.
        columns: (1, L') long, those of the rows.
        starts: (B, L') long, column at which the text of each position begins; None = all texts begin at column 0.
        is_text: (B, L') bool, positions that exist; None = all.
    """

    def __init__(self, config: RelayConfig, columns: Tensor, starts: Tensor | None, is_text: Tensor | None) -> None:
        self.config = config
        self.size: int = config.block_size
        self.columns = columns
        self.starts = starts
        self.is_text = is_text
        self.is_small = is_text is None and config.text_config._attn_implementation == BLOCK_ATTENTION

    def of_clean_text(self) -> Any:
        """Of all columns."""
        if self.is_small:
            return self._small(self.columns, self.starts, 0)
        if self.starts is None:
            return self.is_text  # the model knows the pattern of a row that is one text
        starts, block = self.starts, self.columns[0] // self.size

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (block[key] <= block[query]) & (key >= starts[row, query])

        return _mask(self.config, starts, self.is_text, Prefix([], 0), sees)

    def of_blocks(self, blocks: PackedBlocks, prefix: Prefix) -> Any:
        """Of packed blocks behind as much of the clean text as `prefix` shows."""
        starts = None if self.starts is None else blocks.pack(self.starts)
        if self.is_small:
            return self._small(blocks.columns, starts, blocks.seen)
        length = prefix.get_seq_length()
        block = blocks.columns // self.size  # (B, A*S)
        clean_block = self.columns[:, :length].expand(len(block), -1) // self.size
        key_block = torch.cat([clean_block, block], dim=1)
        is_noisy = torch.arange(key_block.shape[1], device=block.device) >= length

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            here = block[row, query - length]
            is_before = key_block[row, key] < here
            if starts is not None:
                is_before = is_before & (key >= starts[row, query - length])
            return torch.where(is_noisy[key], key_block[row, key] == here, is_before)

        is_text = self.is_text
        visible = None if is_text is None else torch.cat([is_text[:, :length], blocks.pack(is_text)], dim=1)
        return _mask(self.config, block, visible, prefix, sees)

    def _small(self, columns: Tensor, starts: Tensor | None, seen: int) -> Tensor:
        """For "relay_blocks": blocks at (B or 1, A * S) columns, behind `seen` columns of clean text."""
        starts = None if starts is None else starts[:, :: self.size]
        pattern, length = packed_pattern(columns[:, :: self.size], self.size, starts), columns.shape[1]
        return _for_device(pattern, length, seen + length)


def _for_device(pattern: Tensor, length: int, total: int) -> Tensor:
    # Only a CPU reads the pattern without a wait; other devices should use FlexAttention.
    return pattern if pattern.device.type == "cpu" else dense_mask(pattern, length, total)


def _mask(
    config: RelayConfig, like: Tensor, visible: Tensor | None, prefix: Prefix, sees: Callable[..., Tensor]
) -> Any:
    """What transformers makes of a mask function for the positions of `like`, (B, L), behind a prefix."""
    return create_bidirectional_mask(
        config.text_config,
        # Stands for the embeddings, of which only shape and device matter here.
        torch.empty(*like.shape, 0, device=like.device),
        visible,
        **as_cache_argument(prefix),
        and_mask_function=sees,
    )
