"""Rows on demand: the Trainer's loop runs on empty batches, and rows are drawn where a place in the buffer is free.

The Trainer fetches the batches of an optimizer step before it runs them, and counts on so many of them an epoch; how
many rollouts an epoch takes is known when its last row is revealed. So batches are empty, and `epochs.py` ends epochs.
"""

import sys
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import has_length

from ..relay_config import RelayTrainerConfig
from ..rollouts.batches import NO_NUMBER, NumberedRow, number_rows
from ..rollouts.buffer import RolloutBuffer
from .preparation import DataCheckingTrainer
from .row_source import IndexedRows, StreamedRows, make_row_source, processes_of

# Denoising steps until a block is revealed, before any was: Fast-dLLM v2 needs 131 forwards for an answer, which is
# about 12 for a block of 32.
GUESSED_DENOISE_STEPS = 12


class EmptyBatches:
    """As many empty batches as anybody asks for.

    Args:
        source: where the rows come from instead.
    """

    def __init__(self, source: IndexedRows | StreamedRows) -> None:
        self.source = source

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield {}


class DrawingTrainer(DataCheckingTrainer):
    """Draws the rows of objectives with a rollout buffer when a place is free.

    The Trainer computes the epoch that it resumes in from its number of steps, in a private method;
    `tests/trainers/test_epochs.py` fails if it moves.

    Attributes:
        buffer: the rollout buffer of this process.
        source: where its rows come from, from the beginning of a training on; None = batches bring them.
    """

    args: RelayTrainerConfig
    buffer: RolloutBuffer
    source: IndexedRows | StreamedRows | None = None

    def get_train_dataloader(self) -> Any:
        """As in SFTTrainer; with rows on demand, a loader of empty batches.

        Raises:
            ValueError: the loader has no batch.
        """
        loader = super().get_train_dataloader()
        if has_length(loader) and len(loader) == 0:
            rows = self.args.per_device_train_batch_size * self.args.world_size
            raise ValueError(
                f"The training set has fewer rows than a batch ({rows}), and `dataloader_drop_last=True` drops what is "
                "not a whole one: set it to False, or make `per_device_train_batch_size` smaller."
            )
        return EmptyBatches(self._make_source(loader)) if self.args.draws_rows else loader

    def set_initial_training_values(
        self, args: Any, dataloader: Any
    ) -> tuple[int, int, int, int, int, int | None, int]:
        """As in the Trainer, but with rows on demand an epoch has any number of steps, and all of them are guessed."""
        self.source = dataloader.source if args.draws_rows else None
        if not args.estimates_steps or not isinstance(self.train_dataset, Dataset):
            return super().set_initial_training_values(args, dataloader)
        rows = dataloader.source.rows_of(args.num_train_epochs)
        batch = self.get_total_train_batch_size(args)
        denoise_steps = min(self.relay_config.block_size or GUESSED_DENOISE_STEPS, GUESSED_DENOISE_STEPS)
        guess = ceil(rows / batch * ceil(denoise_steps / args.rollout_steps))
        bound = sys.maxsize
        in_epoch = bound * args.gradient_accumulation_steps
        return ceil(args.num_train_epochs), bound, len(self.train_dataset), rows, batch, in_epoch, guess

    def _init_training_state(self, max_steps: int, per_epoch: int, epochs: int, *others: Any) -> tuple[int, int]:
        begun = super()._init_training_state(max_steps, per_epoch, epochs, *others)
        if not self.args.draws_rows:
            return begun
        self.buffer.load_state_dict({})
        source: Any = self.source
        epoch = self.state.epoch or 0.0
        source.start_at(int(epoch))
        if self.args.max_steps > 0:
            is_over = self.state.global_step >= max_steps
        else:
            source.stop_after(self.args.num_train_epochs)
            is_over = epoch >= self.args.num_train_epochs
        # The place in the data is ours: the Trainer is to skip nothing.
        return epochs if is_over else int(epoch), 0

    def _make_source(self, loader: DataLoader) -> IndexedRows | StreamedRows:
        args = self.args
        return make_row_source(
            self.train_dataset,
            loader,
            self.relay_config,
            self._train_batch_size,
            args.process_index,
            args.world_size,
            make_sampler=self._get_train_sampler,  # there is no public name for it
            seed=args.seed if args.data_seed is None else args.data_seed,
            drops_last=args.dataloader_drop_last,
        )

    def _drawn(self, batch: dict[str, Tensor]) -> Iterator[list[NumberedRow]]:
        """The source of rows; without one, the rows of a batch, which nobody counts."""
        if self.source is not None:
            return self.source
        return iter([number_rows(batch, self.relay_config, [NO_NUMBER] * len(batch["input_ids"]))])

    def save_rows(self, folder: Path) -> None:
        """Writes the buffer of this process and its place in the data into a checkpoint."""
        tensors = {**self.buffer.state_dict(), **(self.source.state_dict() if self.source is not None else {})}
        if tensors:
            save_file(tensors, _rows_file(folder, self.args.process_index))

    def load_rows(self, folder: Path) -> None:
        """Goes on with the rows of a checkpoint; after more or fewer processes, what they had left is dealt anew.

        Raises:
            ValueError: the rows are of another model, objective or data set, or a process's file is missing.
        """
        here, first = (_rows_file(folder, process) for process in (self.args.process_index, 0))
        if not (here.exists() or first.exists()):
            return
        # On the CPU: safetensors does not know "cpu:0".
        state = load_file(here if here.exists() else first)
        processes = processes_of(state) if self.source is not None else None
        if processes in (None, self.args.world_size):
            self.buffer.load_state_dict({n: t.to(self.args.device) for n, t in state.items()} if here.exists() else {})
            if processes is not None:
                self.source.load_state_dict(state)
            return
        files = [_rows_file(folder, process) for process in range(processes)]
        if missing := [file.name for file in files if not file.exists()]:
            raise ValueError(
                f"The checkpoint `{folder}` is of {processes} processes, and `{missing[0]}` is missing: bring the "
                "files of all of them into one folder, or resume with as many processes."
            )
        states = [load_file(file) for file in files]
        in_work = [self.buffer.take_over(state, counts=self.is_world_process_zero()) for state in states]
        self.source.deal_anew(states, in_work)


def _rows_file(folder: Path, process: int) -> Path:
    """Each process has rows of its own."""
    return folder / f"rollout_buffer_{process}.safetensors"
