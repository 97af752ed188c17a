"""Ctrl-C and SIGTERM end a training after the step in work, with a checkpoint that goes on exactly from there."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = (
    b"\nInterrupted: this step is finished and a checkpoint is saved. A second interruption stops at once, and saves "
    b"nothing.\n"
)


class SaveOnInterrupt(TrainerCallback):
    """Turns an interruption into a checkpoint. The signals are handled inside the `with` only.

        with SaveOnInterrupt(trainer) as interruption:
            trainer.train()
        if interruption.checkpoint is not None:
            ...  # `trainer.train(resume_from_checkpoint=str(interruption.checkpoint))` goes on

    A signal may come in the middle of a step, whose gradients no checkpoint holds, so the step is finished first. The
    second signal raises KeyboardInterrupt. Several processes stop together, after the same step.

    Args:
        trainer: whose training is interrupted.

    Attributes:
        checkpoint: the folder that was saved, or None if nothing interrupted the training before its last step.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.checkpoint: Path | None = None
        self._signalled = self._stops = False
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> "SaveOnInterrupt":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        self.trainer.add_callback(self)
        return self

    def __exit__(self, *error: object) -> None:
        self.trainer.remove_callback(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loader's worker, which gets Ctrl-C as well
            return
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True
        os.write(2, NOTICE)  # a handler may run inside a `print`, which must not be entered twice

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the training, unless this was its last step anyway."""
        if self._any_signalled() and state.global_step < state.max_steps:
            self._stops = control.should_training_stop = True
            control.should_log = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The Trainer comes here from whatever step ends the training, after the evaluation of that step."""
        if not self._stops:
            return
        if state.epoch % 1:  # it is not the end of an epoch, and what belongs there is not due
            control.should_evaluate = False
        control.should_save = True
        args.save_only_model = False  # there would be nothing to go on from

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Notes the folder."""
        if self._stops:
            self.checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def _any_signalled(self) -> bool:
        """Whether any process was; one that went on alone would wait for the others forever."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return self._signalled
        flag = torch.tensor(float(self._signalled), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum"))
