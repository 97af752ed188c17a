"""Short texts side by side in one row; `denoiser.py` keeps them from seeing each other.

Only a pass of the network knows rows that hold several texts: masks, reveals, states and losses are those of one text
in each row. So nothing else has to know where a text ends.

Legend: B texts in rows of their own, L their positions; R rows that hold them side by side, W positions of those;
S positions of a block; N positions of all texts together.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from .active_blocks import rounded_up
from .rows import RolloutRows, to_device


def plan(lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Where texts begin in rows of at most `width` positions: row and column of each.

    The longest come first, each into the first row that has room (first-fit decreasing). A text that is longer than
    `width` has a row of its own, and one of no position lies at (0, 0).
    """
    used: list[int] = []
    places = [(0, 0)] * len(lengths)
    for text in sorted(filter(lengths.__getitem__, range(len(lengths))), key=lambda text: -lengths[text]):
        row = next((row for row, taken in enumerate(used) if taken + lengths[text] <= width), len(used))
        if row == len(used):
            used.append(0)
        places[text] = row, used[row]
        used[row] += lengths[text]
    return places


def rows_needed(lengths: Sequence[int], width: int, block_size: int | None) -> int:
    """In how many rows texts lie side by side; arguments as in `Layout`."""
    size = block_size or 1
    places = plan([rounded_up(number, size) for number in lengths], rounded_up(width, size))
    return 1 + max((row for row, _ in places), default=-1)


class Layout:
    """B texts side by side in R rows. What it sends to the device, the device need not be waited for.

    Args:
        rows: the texts, each in a row of its own.
        width: most positions that texts share; rows are no longer than the fullest.
        block_size: S, at whose multiples texts begin; None = anywhere.
        lengths: positions of each text that are seen; None = to find out waits for the device.

    Attributes:
        starts: (R, W) long, column at which the text of each position begins. What no text takes of a row counts as
            one more text.
        positions: (R, W) long, position of each in its text; 0 where no text is.
        longest: positions of the longest text, filled up to whole blocks.
        seen: positions of all texts.
    """

    def __init__(
        self, rows: RolloutRows, width: int, block_size: int | None, lengths: Sequence[int] | None = None
    ) -> None:
        size, device, length = block_size or 1, rows.clean_ids.device, rows.clean_ids.shape[1]
        lengths = rows.attention_mask.sum(-1).tolist() if lengths is None else lengths
        filled = [rounded_up(number, size) for number in lengths]
        places = plan(filled, rounded_up(width, size))
        self.longest, self.seen = max(filled), sum(lengths)
        self._apart = len(lengths), length
        self._joined = (
            1 + max(row for row, _ in places),
            max(size, *(column + number for (_, column), number in zip(places, filled, strict=True))),
        )
        self.starts = to_device(self._starts(places, filled), device)
        firsts = [row * self._joined[1] + column for row, column in places]
        # (N,) each: positions of the texts, counted through all rows.
        self._from, self._to = (
            to_device(torch.cat([torch.arange(n) + first for first, n in zip(starts, lengths, strict=True)]), device)
            for starts in ([text * length for text in range(len(lengths))], firsts)
        )
        self.positions = self.join(torch.arange(length, device=device).expand(self._apart))

    def _starts(self, places: list[tuple[int, int]], filled: list[int]) -> Tensor:
        starts = torch.zeros(self._joined, dtype=torch.long)
        for (row, column), number in sorted(zip(places, filled, strict=True)):
            starts[row, column:] = column
            starts[row, column + number :] = column + number
        return starts

    def join(self, tensor: Tensor) -> Tensor:
        """(B, L, ...) or (B,) -> (R, W, ...), 0 where no text is."""
        if tensor.ndim == 1:
            tensor = tensor[:, None].expand(self._apart)
        return _moved(tensor, self._from, self._to, self._joined)

    def split(self, tensor: Tensor) -> Tensor:
        """(R, W, ...) -> (B, L, ...), 0 where no text is."""
        return _moved(tensor, self._to, self._from, self._apart)

    def join_rows(self, rows: RolloutRows) -> RolloutRows:
        """The texts side by side, without their states, which are handed to a step beside the rows."""
        return replace(rows, relay_state=None).map(self.join)


def _moved(tensor: Tensor, source: Tensor, target: Tensor, shape: tuple[int, int]) -> Tensor:
    """The positions `source` of (n, l, ...), counted through all rows, put at `target` of (*shape, ...)."""
    values = tensor.flatten(0, 1).index_select(0, source)
    return values.new_zeros(prod(shape), *values.shape[1:]).index_copy(0, target, values).unflatten(0, shape)
