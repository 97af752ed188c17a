"""How fast this machine trains: threads by what is free, the first steps measured, fewer steps where they are slow."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..trainers.objectives import RECIPES
from .arguments import DemoArguments, changed_fields
from .study import ROLLOUT_STEPS, THRESHOLDS, new_model, train_model

SAMPLE_SECONDS = 1.0
# Untimed and timed steps of the measurement.
WARM_STEPS, TIMED_STEPS = 1, 3
DEFAULT_MINUTES = 10.0
# A few steps foretell no more exactly than this, and a machine that is a little slow is to give the usual figures.
TOLERANCE = 1.3
# What a scaled study has at least, or as much as the whole one.
SMALL_BATCH, FEW_STEPS, FEW_TEST_PUZZLES = 32, 10, 64
# Forwards until the last puzzle of a batch is filled in, on average over the thresholds; a step's pass takes three.
EVALUATION_FORWARDS, FORWARDS_PER_PASS = 8, 3
WHERE_CGROUPS_ARE = Path("/sys/fs/cgroup")


def free_cores() -> int:
    """Number of cores that this process may use and others leave idle now, at least 1."""
    busy = psutil.cpu_percent(SAMPLE_SECONDS, percpu=True)  # of each core, in %
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(len(busy))
    idle = sum(1 - busy[core] / 100 for core in allowed if core < len(busy))
    return max(1, round(min(idle, cpu_quota(WHERE_CGROUPS_ARE))))


def cpu_quota(root: Path) -> float:
    """Cores' worth of time that the container may use, infinite without a limit.

    Args:
        root: where control groups are mounted, version 2 or 1.
    """
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return float("inf")
    return float("inf") if limit == "max" or float(limit) < 0 else float(limit) / float(period)


@contextmanager
def threads_for(cores: int) -> Iterator[int]:
    """Lets PyTorch use as many threads as `cores`, but no more than it would; yields how many."""
    usual = torch.get_num_threads()
    torch.set_num_threads(min(usual, cores))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(usual)


def fit_to_machine(
    arguments: DemoArguments, tokenizer: PreTrainedTokenizerBase, puzzles: Dataset
) -> tuple[DemoArguments, str]:
    """Measures a few steps and scales the study down if it would take too long.

    It becomes smaller only if the user chose no size, or gave `minutes`.

    Returns:
        The arguments to run with, and a sentence about what was scaled, "" if nothing was.
    """
    seconds = seconds_per_pass(arguments, tokenizer, puzzles)
    whole = passes(arguments) * seconds / 60
    print(f"\na training step of {arguments.batch_size} puzzles takes {seconds:.2g} s, all of it about {say(whole)}")
    limit = minutes_allowed(arguments)
    if whole <= limit * (TOLERANCE if arguments.minutes is None else 1):
        return arguments, ""
    scaled = replace(arguments, batch_size=min(arguments.batch_size, SMALL_BATCH))
    scaled.test_puzzles = min(arguments.test_puzzles, FEW_TEST_PUZZLES)
    scaled = fewer_steps(scaled, limit * 60 / seconds_per_pass(scaled, tokenizer, puzzles))
    names = ("batch_size", "warmup_steps", "steps", "test_puzzles")
    changes = [
        f"--{name.replace('_', '-')} {getattr(scaled, name)} in place of {getattr(arguments, name)}"
        for name in names
        if getattr(scaled, name) != getattr(arguments, name)
    ]
    note = (
        f"Scaled to about {say(limit)}: {', '.join(changes)}. So the figures differ from the README's; "
        f"`--minutes {max(1, round(2 * whole))}` would run all of it."
    )
    print(note, flush=True)
    return scaled, note


def minutes_allowed(arguments: DemoArguments) -> float:
    """How long training may take: as asked; else ten minutes, or without end if a size was chosen."""
    if arguments.minutes is not None:
        return arguments.minutes
    chosen = set(changed_fields(arguments)) - {"output_dir", "fresh"}
    return float("inf") if chosen else DEFAULT_MINUTES


def passes(arguments: DemoArguments) -> float:
    """The work of a study, in passes forwards and backwards through one batch."""
    evaluation = (
        len(THRESHOLDS) * EVALUATION_FORWARDS / FORWARDS_PER_PASS * arguments.test_puzzles / arguments.batch_size
    )
    per_step = [ROLLOUT_STEPS if RECIPES[objective].uses_buffer else 1 for objective in arguments.objectives]
    adaptation = arguments.steps * sum(per_step) + evaluation * len(per_step)
    return arguments.seeds * (arguments.warmup_steps + adaptation)


def fewer_steps(arguments: DemoArguments, allowed: float) -> DemoArguments:
    """As many steps, in the same proportion, as fit into `allowed` passes."""
    evaluation = passes(replace(arguments, warmup_steps=1, steps=1))
    share = min(1.0, max(0.0, (allowed - evaluation) / passes(arguments)))
    warmup, steps = (
        min(asked, max(FEW_STEPS, int(asked * share))) for asked in (arguments.warmup_steps, arguments.steps)
    )
    return replace(arguments, warmup_steps=warmup, steps=steps)


def seconds_per_pass(arguments: DemoArguments, tokenizer: PreTrainedTokenizerBase, puzzles: Dataset) -> float:
    """Seconds of a training step with one pass, measured on a model that is thrown away."""
    set_seed(0)
    model, clock = new_model(arguments, tokenizer), StepClock()
    train_model(model, tokenizer, puzzles, "masked", 0, arguments, WARM_STEPS + TIMED_STEPS, callbacks=[clock])
    return (clock.ends[-1] - clock.ends[WARM_STEPS - 1]) / TIMED_STEPS


class StepClock(TrainerCallback):
    """Notes when each optimizer step ended, in seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.ends.append(time.monotonic())


def say(minutes: float) -> str:
    """A duration in words, from minutes."""
    return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{max(1, round(minutes))} min"
