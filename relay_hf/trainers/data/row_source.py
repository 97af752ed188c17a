"""Where the rows of training come from: every row of every epoch once, dealt to processes, read when it is drawn.

The loaders of accelerate do not serve: they read ahead, repeat rows to even out processes, and send streams from one
process to the others, which would wait for each other when they draw at different times.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from math import floor, inf
from typing import Any

import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ...modeling import RelayConfig
from ..rollouts.batches import NumberedRow, number_rows

NUMBERS, DEALT = "source_numbers", "source_dealt"  # in checkpoints
# More rows than any epoch of a stream has: what the numbers of its rows count epochs by.
STREAM = 2**40


class RowSource:
    """Iterates over batches of rows, which know their numbers: the epoch times `stride`, plus the place in its order.

    Args:
        loader: the Trainer's loader, which is not iterated: its data set, collator and workers are taken.
        config: the model's configuration.
        batch_size: rows for which the collator is called at once.
        process, processes: index of this process, and how many there are.

    Attributes:
        end: only rows with lower numbers are drawn.
    """

    stride: int

    def __init__(
        self, loader: DataLoader, config: RelayConfig, batch_size: int, process: int = 0, processes: int = 1
    ) -> None:
        self.loader: Any = loader
        self.config = config
        self.batch_size = batch_size
        self.process, self.processes = process, processes
        self.end: float = inf
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[list[NumberedRow]]:
        return self

    def __next__(self) -> list[NumberedRow]:
        raise NotImplementedError

    @property
    def next_number(self) -> float:
        """No row that is still to be drawn by this process has a lower number."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """The place in the data, as tensors."""
        raise NotImplementedError

    def _load(self, dataset: Any, **batching: Any) -> Iterator[Any]:
        """Batches of the collator. They are not pinned: rows are cut out of them before they go to the device."""
        loader = self.loader
        return iter(
            DataLoader(
                dataset,
                collate_fn=loader.collate_fn,
                num_workers=loader.num_workers,
                prefetch_factor=loader.prefetch_factor,
                multiprocessing_context=loader.multiprocessing_context,
                worker_init_fn=loader.worker_init_fn,
                generator=torch.Generator(),  # not the global one, whose numbers a resumed run has to draw again
                **batching,
            )
        )


class IndexedRows(RowSource):
    """Rows of a data set with a length: in each epoch the order of the Trainer's sampler, dealt one by one.

    Args:
        loader, config, batch_size, process, processes: as in `RowSource`.
        make_sampler: the Trainer's sampler of indices; an epoch makes one, and iterates over it, from one seed.
        seed: of the first epoch; each adds its number.
        drops_last: whether an epoch leaves out what would be no whole batch of all processes.

    Attributes:
        left: the numbers that this process was dealt and has not drawn yet, in order.
        dealt: the epochs that were dealt; the next one is when they are drawn.
    """

    def __init__(
        self, *args: Any, make_sampler: Callable[[], Iterable[int]], seed: int, drops_last: bool = False
    ) -> None:
        super().__init__(*args)
        self.make_sampler = make_sampler
        self.stride = len(self.loader.dataset)
        self.per_epoch = rows_per_epoch(self.stride, self.batch_size * self.processes, drops_last)
        self.seed = seed
        self.left = torch.zeros(0, dtype=torch.long)
        self.dealt = 0
        self._asked: deque[Tensor] = deque()  # numbers of the batches that workers are reading
        self._orders: dict[int, array[int]] = {}

    def rows_of(self, epochs: float) -> int:
        """The number of rows that all processes draw in some epochs, which may be a fraction."""
        return floor(epochs) * self.per_epoch + round(epochs % 1 * self.per_epoch)

    def stop_after(self, epochs: float) -> None:
        """Draws no row beyond some epochs."""
        self.end = floor(epochs) * self.stride + round(epochs % 1 * self.per_epoch)

    def __next__(self) -> list[NumberedRow]:
        if self._batches is None:
            self._batches = self._load(self.loader.dataset, batch_sampler=self._index_batches())
        batch = next(self._batches)
        numbers = self._asked.popleft()
        self.left = self.left[len(numbers) :]
        return number_rows(batch, self.config, numbers.tolist())

    @property
    def next_number(self) -> float:
        if len(self.left):
            return int(self.left[0])
        return self.dealt * self.stride + self.process if self.process < self.per_epoch else inf

    def start_at(self, epoch: int) -> None:
        """Begins with a whole epoch."""
        self.left, self.dealt = self.left[:0], epoch

    def state_dict(self) -> dict[str, Tensor]:
        return {NUMBERS: self.left.clone(), DEALT: torch.tensor([self.dealt, self.stride, self.processes])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from the place that a checkpoint of this process says.

        Raises:
            ValueError: the data set has another number of rows.
        """
        self._check_rows(state)
        self.left, self.dealt = state[NUMBERS].cpu(), int(state[DEALT][0])

    def deal_anew(self, states: Sequence[Mapping[str, Tensor]], in_work: list[Tensor]) -> None:
        """Goes on from the checkpoint of another number of processes.

        Args:
            states: of all those processes, in their order.
            in_work: numbers of rows that they had drawn and not finished, which begin again.

        Raises:
            ValueError: the data set has another number of rows.
        """
        for state in states:
            self._check_rows(state)
        self.dealt = max(int(state[DEALT][0]) for state in states)
        open_deals = [
            self._deal(epoch, process, len(states))
            for process, state in enumerate(states)
            for epoch in range(int(state[DEALT][0]), self.dealt)
        ]
        everything = torch.cat([*(state[NUMBERS] for state in states), *open_deals, *in_work])
        self.left = everything.sort().values[self.process :: self.processes].clone()

    def _index_batches(self) -> Iterator[list[int]]:
        """Indices of rows, epoch after epoch, until `end`; workers ask for them before they are drawn."""
        while True:
            ahead = sum(map(len, self._asked))
            if ahead == len(self.left):
                self.left = torch.cat([self.left, self._deal(self.dealt, self.process, self.processes)])
                self.dealt += 1
            numbers = self.left[ahead : ahead + self.batch_size]
            # A batch of one epoch, as the Trainer's.
            numbers = numbers[(numbers < self.end) & (numbers // self.stride == numbers[:1] // self.stride)]
            if not len(numbers):
                return
            self._asked.append(numbers)
            yield [self._order(number // self.stride)[number % self.stride] for number in numbers.tolist()]

    def _deal(self, epoch: int, process: int, processes: int) -> Tensor:
        first = epoch * self.stride
        return torch.arange(first + min(process, self.per_epoch), first + self.per_epoch, processes)

    def _order(self, epoch: int) -> "array[int]":
        """The indices of an epoch in its order; the last two orders are kept."""
        if epoch not in self._orders:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed + epoch)
                order = array("q", self.make_sampler())
            self._orders = {**{e: o for e, o in self._orders.items() if e == epoch - 1}, epoch: order}
        return self._orders[epoch]

    def _check_rows(self, state: Mapping[str, Tensor]) -> None:
        if (rows := int(state[DEALT][1])) != self.stride:
            raise ValueError(
                f"The checkpoint is of a training set with {rows} rows, but this one has {self.stride}: resume with "
                "the same rows, or load the checkpoint as a model and start a new run."
            )


class StreamedRows(RowSource):
    """Rows of a stream: each process reads its own part, epoch after epoch.

    Args:
        stream: the whole of it, of which the loader has only a part.
        loader, config, batch_size, process, processes: as in `RowSource`.
    """

    stride = STREAM

    def __init__(self, stream: Any, *args: Any) -> None:
        super().__init__(*args)
        self.stream = stream
        self._next = 0
        self._has_rows = True

    def __next__(self) -> list[NumberedRow]:
        while self._has_rows:
            if self._batches is None:
                self._begin_epoch()
            batch = next(self._batches, None)
            if batch is not None:
                numbers = range(self._next, self._next + len(batch["input_ids"]))
                self._next = numbers.stop
                return number_rows(batch, self.config, numbers)
            self._has_rows = self._next % STREAM > 0  # else the next epoch had none, either
            self._next += STREAM - self._next % STREAM
            self._batches = None
        raise StopIteration

    @property
    def next_number(self) -> float:
        return self._next if self._has_rows else inf

    def start_at(self, epoch: int) -> None:
        """Begins with a whole epoch."""
        self._next = epoch * STREAM

    def state_dict(self) -> dict[str, Tensor]:
        return {DEALT: torch.tensor([self._next, STREAM, self.processes])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from the place that a checkpoint of this process says: rows before it are read once more."""
        self._next = int(state[DEALT][0])
        self._begin_epoch(self._next % STREAM)

    def deal_anew(self, states: Sequence[Mapping[str, Tensor]], in_work: list[Tensor]) -> None:
        """Not possible.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"The checkpoint is of {len(states)} processes, each of which read its own part of a stream: resume with "
            "as many, or train on a data set that has a length."
        )

    def _begin_epoch(self, passed: int = 0) -> None:
        """Begins to read the epoch that `_next` is in, and passes over the rows that were drawn before."""
        part = split_dataset_by_node(self.stream, rank=self.process, world_size=self.processes)
        part.set_epoch(self._next // STREAM)
        self._batches = self._load(part, batch_size=self.batch_size)
        while passed > 0 and (batch := next(self._batches, None)) is not None:
            passed -= len(batch["input_ids"])
            if passed < 0:  # the batch size is another one now
                self._batches = chain([{name: t[passed:] for name, t in batch.items()}], self._batches)


def rows_per_epoch(rows: int, batch: int, drops_last: bool) -> int:
    """The rows that an epoch draws; `batch` is that of all processes together."""
    return rows // batch * batch if drops_last else rows


def make_row_source(dataset: Any, loader: DataLoader, *args: Any, **options: Any) -> IndexedRows | StreamedRows:
    """The source for a data set and its loader; `options` are those of `IndexedRows`."""
    if isinstance(dataset, IterableDataset):
        return StreamedRows(dataset, loader, *args)
    return IndexedRows(loader, *args, **options)


def processes_of(state: Mapping[str, Tensor]) -> int | None:
    """How many processes wrote a checkpoint; None if it has no place in the data."""
    return int(state[DEALT][2]) if DEALT in state else None
