"""Refuses to call a run a success in which no batch came."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RefuseNoBatch(TrainerCallback):
    """Looks, when training ends, whether it made a step; the Trainer would not mind."""

    def __init__(self) -> None:
        self.first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.first_step = state.global_step

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Checks the number of steps.

        Raises:
            ValueError: there was no batch.
        """
        if state.global_step == self.first_step < state.max_steps:
            raise ValueError(
                f"The training set gave no batch, so none of {state.max_steps} steps was made: check where it is "
                "loaded from, and `dataloader_drop_last`."
            )
