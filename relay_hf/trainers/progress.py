"""The progress of a training in lines for people; trackers get every number."""

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Logged name -> what a person reads, and how.
SHOWN = {
    "loss": "loss {:.3f}",
    "loss_masked_100": "at full noise {:.3f}",
    "masked_fraction": "{:.0%} masked",
    "grad_norm": "gradient {:.2g}",
    "learning_rate": "lr {:.1e}",
}


class ReadableProgress(TrainerCallback):
    """One line per log, with the time that is left as measured so far; a bar only where it can be redrawn."""

    def __init__(self) -> None:
        self.bar: Any = None
        self._started = (0, 0.0)  # step and time after the first step, which pays for everything that is made once
        self._first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._first_step = state.global_step
        if state.is_world_process_zero and sys.stderr.isatty() and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self._first_step + 1:
            self._started = state.global_step, time.perf_counter()
        if self.bar is not None:
            self.bar.total = state.max_steps  # an estimate changes
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs:
            line = f"{state.global_step:,} steps, {duration(logs['train_runtime'])}"
        elif "loss" in logs:
            parts = [text.format(logs[name]) for name, text in SHOWN.items() if name in logs]
            line = f"{_step(args, state)}  {'  '.join(parts)}{self._time_left(state)}"
        else:
            losses = [f"{name} {value:.3f}" for name, value in logs.items() if name.endswith("_loss")]
            line = f"{_step(args, state)}  {'  '.join(losses)}"
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _time_left(self, state: TrainerState) -> str:
        step, since = self._started
        if state.global_step <= step:
            return ""
        seconds = (time.perf_counter() - since) / (state.global_step - step)
        return f"  {seconds:.2f} s/step, {duration(seconds * (state.max_steps - state.global_step))} left"


def _step(args: TrainingArguments, state: TrainerState) -> str:
    """The step, and how many there are, as far as it is known."""
    about = "about " if getattr(args, "estimates_steps", False) else ""
    return f"step {state.global_step:,}/{about}{state.max_steps:,}"


def duration(seconds: float) -> str:
    """Seconds as "1:02:03" or "2:03"."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
