"""Errors and warnings about runs that train nothing, or fewer rows than their epochs draw."""

from math import ceil
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .rollouts.buffer import RolloutBuffer

logger = logging.get_logger(__name__)


def check_loader(loader: DataLoader, args: TrainingArguments) -> None:
    """Raise if the training set has no batch, because the Trainer would then end without an error.

    Raises:
        ValueError: the loader has no batch.
    """
    if has_length(loader) and len(loader) == 0:
        rows = args.per_device_train_batch_size * args.world_size
        raise ValueError(
            f"The training set has fewer rows than a batch ({rows}), and `dataloader_drop_last=True` drops what is not "
            "a whole one: set it to False, or make `per_device_train_batch_size` smaller."
        )


class ReportShortfall(TrainerCallback):
    """Compares the rows that were trained with the rows that were drawn, when training ends.

    Args:
        buffer: the rollout buffer of this process.
    """

    def __init__(self, buffer: RolloutBuffer) -> None:
        self.buffer = buffer
        self.first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.first_step = state.global_step

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Warns of rows that were drawn but not trained.

        Raises:
            ValueError: there was no batch.
        """
        if state.global_step == self.first_step < state.max_steps:
            raise ValueError(
                f"The training set gave no batch, so none of {state.max_steps} steps was made: check where it is "
                "loaded from, and `dataloader_drop_last`."
            )
        left = len(self.buffer.queue) + self.buffer.dropped
        if args.max_steps > 0 or not left or state.global_step < state.max_steps:
            return
        drawn = left + self.buffer.entered
        steps = ceil(state.global_step * drawn / self.buffer.entered)
        logger.warning(
            f"{left} of {drawn} rows that were drawn in {state.epoch:.3g} epochs were not trained: a row is denoised "
            "in several steps, and new rows wait for a place meanwhile, or are dropped where `buffer_queue_size` of "
            f"them wait already ({self.buffer.dropped} rows). `max_steps={steps}` would train about as many rows as "
            "were drawn."
        )
