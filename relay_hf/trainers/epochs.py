"""Ends epochs, and a training that counts them, when every row was revealed; estimates how many steps that takes."""

from math import ceil
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.optimization import get_scheduler

from .data.row_source import IndexedRows

NEVER = 2**62  # a number that no row has


class Standing(NamedTuple):
    """Where all processes together are in the data.

    Args:
        oldest: no row with a lower number is still to be revealed.
        entered: rows that have come into a buffer.
        revealed: how many of them were revealed; parts of rows count.
    """

    oldest: int
    entered: int
    revealed: float


class CountEpochs(TrainerCallback):
    """Says when an epoch and the training are over, which the Trainer cannot compute from its number of steps.

    An epoch is over when every row of it is revealed in every process; rows of the next one may be in work before. In
    the last epoch the buffers run empty. `state.epoch` is the part of the rows that was revealed, and without
    `args.max_steps` the end of the run, `state.max_steps`, is an estimate, which the learning rate follows.

    Args:
        trainer: whose rows are drawn on demand; its callbacks, this one and those of the user, come in this order.
        follows: whether the learning rate is to follow; not that of a scheduler of the user.
    """

    def __init__(self, trainer: Any, follows: bool) -> None:
        self.trainer = trainer
        self.follows = follows
        self._epoch = 0  # the one in work
        self._first_step = 0  # of a stream's epoch
        self._standing = Standing(0, 0, 0.0)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        epoch = state.epoch or 0.0
        self._epoch = int(epoch)
        self._first_step = state.global_step - round(epoch % 1 * args.max_steps)
        self._standing = self._look()
        if args.estimates_steps and state.global_step:
            state.max_steps = self._estimate(state.global_step, state.max_steps)

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, lr_scheduler: Any, **_: Any
    ) -> None:
        """Here all rollouts of a step have run, and its end is not yet decided.

        Raises:
            ValueError: the training set has no row.
        """
        self._standing = self._look()
        if not self._standing.entered:
            raise ValueError("The training set gave no row: check where it is loaded from.")
        if args.estimates_steps:
            state.max_steps = self._estimate(state.global_step + 1, state.max_steps)
            if self.follows:
                follow_estimate(lr_scheduler, args, state.max_steps)
            for callback in self.trainer.callback_handler.callbacks:
                if (bar := getattr(callback, "training_bar", None)) is not None:  # of the Trainer's progress
                    bar.total = state.max_steps

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._standing.oldest >= self.trainer.source.end:
            state.epoch = float(args.num_train_epochs)
        elif self._standing.oldest >= (self._epoch + 1) * self.trainer.source.stride:
            self._epoch += 1
            self._first_step = state.global_step
            state.epoch = float(self._epoch)
            control.should_epoch_stop = True
        else:
            state.epoch = self._epoch + self._fraction(args, state)

    def _look(self) -> Standing:
        """One exchange of four numbers between processes."""
        buffer, source, accelerator = self.trainer.buffer, self.trainer.source, self.trainer.accelerator
        oldest = min([source.next_number, *buffer.unfinished, NEVER])
        numbers = [[oldest, buffer.entered, buffer.learned, buffer.revealed]]
        if accelerator.num_processes > 1:
            numbers = accelerator.gather(torch.tensor(numbers, device=accelerator.device)).tolist()
        each_oldest, entered, learned, revealed = zip(*numbers, strict=True)
        return Standing(min(each_oldest), sum(entered), sum(entered) * sum(revealed) / max(sum(learned), 1))

    def _estimate(self, steps: int, guess: int) -> int:
        """The number of steps in the end; `steps` itself if it is reached, and more than that if it is not."""
        standing, source = self._standing, self.trainer.source
        if standing.oldest >= source.end:
            return steps
        if standing.revealed > 0:
            guess = ceil(steps * source.rows_of(self.trainer.args.num_train_epochs) / standing.revealed)
        return max(guess, steps + 1)

    def _fraction(self, args: Any, state: TrainerState) -> float:
        """The part of the epoch that is done, below 1; of a stream, whose length is unknown, the part of all steps."""
        source = self.trainer.source
        if not isinstance(source, IndexedRows):
            return (state.global_step - self._first_step) / (args.max_steps + 1)
        part = self._standing.revealed / source.per_epoch - self._epoch
        return min(max(part, 0.0), 1 - 0.5 / source.per_epoch)


def follow_estimate(scheduler: Any, args: Any, steps: int) -> None:
    """Lets the rest of a schedule be that of another number of steps; a schedule without a formula does not change.

    Args:
        scheduler: as the Trainer has made it of `args`.
        args: training arguments.
        steps: the number.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # inside accelerate's, with DeepSpeed
    if not hasattr(scheduler, "lr_lambdas"):
        return
    optimizer = torch.optim.SGD([torch.zeros(0)], lr=args.learning_rate)
    made = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        args.get_warmup_steps(steps),
        steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    scheduler.lr_lambdas[:] = made.lr_lambdas * len(scheduler.lr_lambdas)  # one for each group of parameters
