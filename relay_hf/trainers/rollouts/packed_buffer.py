"""The rollout buffer where texts share rows: it holds as many as lie side by side; see `packing.py`."""

from collections.abc import Iterator
from typing import Any

import torch

from .batches import NO_NUMBER, NumberedRow
from .buffer import RolloutBuffer
from .packing import rows_needed
from .rows import seen_length, to_device


class PackedBuffer(RolloutBuffer):
    """Has a slot for each text in work, and takes the next text as long as rows of a given width hold all of them.

    Where texts lie is planned anew in each step, so that places of finished ones come together. A plan of fewer texts
    may, rarely, need a row more; then the step has it.

    Args:
        width: most positions that texts share.
        options, named: as in `RolloutBuffer`.
    """

    def __init__(self, width: int, *options: Any, **named: Any) -> None:
        super().__init__(*options, **named)
        self.width = width
        self._rows = 0  # that texts may take

    def refill(self, source: Iterator[list[NumberedRow]], slots: int) -> int:
        """As in `RolloutBuffer`, but `slots` is the number of rows that the texts share."""
        entered = super().refill(source, slots)
        if not entered:
            self.lengths = self._in_work()
        return entered

    def _has_next(self, source: Iterator[list[NumberedRow]], free: list[int], entering: list[NumberedRow]) -> bool:
        """A text must be read to see whether it fits."""
        if not self._is_waiting(source):
            return False
        lengths = [*self._in_work(), *self._lengths_of([*entering, self.queue[0]])]
        return rows_needed(lengths, self.width, self.config.block_size) <= self._rows

    def _enter(self, rows: list[NumberedRow], free: list[int], kept: list[int], is_staggered: bool) -> None:
        in_work = self._in_work()
        stay = [slot for slot, length in enumerate(in_work) if length]
        lengths = [in_work[slot] for slot in stay]
        index = to_device(torch.tensor(stay, dtype=torch.long), self.device)
        blank = self._blank(len(rows)).fit(self.rows.clean_ids.shape[1])
        self.rows = self.rows.map(lambda old, new: torch.cat([old[index], new]), blank)
        self.numbers = [self.numbers[slot] for slot in stay] + [NO_NUMBER] * len(rows)
        super()._enter(rows, list(range(len(stay), len(self.numbers))), lengths, is_staggered)
        self.lengths = lengths + self._lengths_of(rows)

    def _set_slots(self, slots: int) -> None:
        """There is a slot for each text. If the batch size has shrunk, the last ones wait for room, and begin again."""
        is_less, self._rows = slots < self._rows, slots
        if self.rows is None:
            super()._set_slots(1)
        elif is_less:
            lengths, count = self._in_work(), len(self.numbers)
            while rows_needed(lengths[:count], self.width, self.config.block_size) > slots:
                count -= 1
            super()._set_slots(max(count, 1))

    def _in_work(self) -> list[int]:
        return [length if left else 0 for left, length in zip(*self.look(), strict=True)]

    def _lengths_of(self, rows: list[NumberedRow]) -> list[int]:
        return [seen_length(self.config, len(text.ids)) for _, text in rows]
