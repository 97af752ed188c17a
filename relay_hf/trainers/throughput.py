"""How fast training goes through text: tokens and rows per second, and the share of padding in what is computed."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .metrics import Number, RunningMeans
from .rollouts.packing import Layout
from .rollouts.rows import RolloutRows

TOKENS, ROWS, PADDING = "tokens_per_second", "rows_per_second", "padding"


class Throughput(TrainerCallback):
    """Adds to the means that are logged how much text this process has trained on in the time of its optimizer steps.

    Evaluations, checkpoints and the time between two trainings do not count.

    Args:
        means: receives the numbers; the trainer empties it when it logs.
    """

    def __init__(self, means: RunningMeans) -> None:
        self.means = means
        self._began = 0.0

    def add(self, rows: RolloutRows, new_rows: Number, layout: Layout | None = None) -> None:
        """Adds a micro-batch.

        Args:
            rows: its rows; the tokens of a row count once in each micro-batch, whatever the number of steps.
            new_rows: how many of them the model has not seen in the micro-batch before.
            layout: of texts that share rows for the model.
        """
        text = rows.attention_mask.sum() if layout is None else layout.seen
        self.means.add_sum(TOKENS, text, 0.0)
        self.means.add_sum(ROWS, new_rows, 0.0)
        positions = (rows.attention_mask if layout is None else layout.starts).numel()
        self.means.add_sum(PADDING, positions - text, positions)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The next log line, if any, comes after this."""
        seconds = time.perf_counter() - self._began
        for name in (TOKENS, ROWS):
            self.means.add_sum(name, 0.0, seconds)
