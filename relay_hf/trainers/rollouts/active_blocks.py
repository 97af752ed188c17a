"""The blocks of rows that still hold a mask, side by side; see `denoiser.py`.

Legend: B rows, L' positions, S positions of a block, A active blocks of the row that has most, N masked positions.
"""

import torch
from torch import Tensor

Places = tuple[Tensor, Tensor]  # rows and columns, (N,) each


def places_of(chosen: Tensor, count: int) -> Places:
    """Rows and columns of the True entries of (B, L), in row-major order; their number is given, so nothing waits."""
    rows, columns = torch.nonzero_static(chosen, size=count).unbind(-1)
    return rows, columns


def spread(numbers: Tensor, places: Places, like: Tensor) -> Tensor:
    """(N,) numbers of the positions at (N,) rows and (N,) columns -> (B, L), the shape of `like`, 0 at all others."""
    return numbers.new_zeros(like.shape).index_put(places, numbers)


def rounded_up(number: int, unit: int) -> int:
    """The multiple of `unit` that is not below the number, and nearest to it."""
    return -(-number // unit) * unit


class PackedBlocks:
    """The blocks that still hold a mask, side by side in each row. To pack them waits for the device once.

    Args:
        masked: (B, L') bool, L' a multiple of `unit`.
        shown: (B, L') bool, where the text shows [MASK].
        size: S.
        unit: a multiple of S, to multiples of which A * S and the clean text that the blocks see are rounded up.

    Attributes:
        is_masked: (B, A * S) bool, `masked` packed.
        columns: (B, A * S) where packed positions come from. Rows with fewer active blocks are filled up with inactive
            ones, whose results are not read.
        is_active: (B, A * S) bool, packed positions of active blocks.
        seen: columns of the clean text, behind which no active block begins.
        masks: how many [MASK]s the active blocks show.
        scored: rows and packed columns, (N,) each, of the masked positions.
        places: rows and columns, (N,) each, of the same positions before packing.
    """

    def __init__(self, masked: Tensor, shown: Tensor, size: int, unit: int) -> None:
        active = masked.view(len(masked), -1, size).any(-1)  # (B, blocks)
        last = (active * torch.arange(active.shape[1], device=masked.device)).max()
        # All that the host has to know of a step, in one transfer; with these sizes, nothing else waits.
        masks = (shown.view(*active.shape, size) & active[..., None]).sum()
        count, last, total, self.masks = torch.stack([active.sum(-1).max(), last, masked.sum(), masks]).tolist()
        self.seen = rounded_up(last * size, unit)
        width = rounded_up(max(count, 1) * size, unit)
        # Active blocks first, in their order.
        blocks = active.long().argsort(dim=-1, descending=True, stable=True)[:, : width // size]  # (B, A)
        self.columns = (blocks[..., None] * size + torch.arange(size, device=blocks.device)).flatten(1)
        self.is_active = active.gather(1, blocks).repeat_interleave(size, dim=1)
        self._row = torch.arange(len(blocks), device=blocks.device)[:, None]  # (B, 1)
        self.is_masked = self.pack(masked)
        self.scored = places_of(self.is_masked, total)
        self.places = self.scored[0], self.columns[self.scored]

    def pack(self, tensor: Tensor) -> Tensor:
        """(B, L', ...) -> (B, A * S, ...)."""
        return tensor[self._row, self.columns]  # `gather` would keep the whole tensor for the backward pass

    def unpack(self, packed: Tensor, known: Tensor) -> Tensor:
        """(B, A * S, ...) -> (B, L', ...): what is packed, and in blocks that are not what is `known`."""
        is_active = self.is_active.view(*self.is_active.shape, *[1] * (packed.ndim - 2))
        values = torch.where(is_active, packed.to(known.dtype), self.pack(known))
        return known.index_put((self._row, self.columns), values)
