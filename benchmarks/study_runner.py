"""How one arm of a study is trained, evaluated and kept; `study.py` has the studies."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from study_results import Results
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, set_seed

from relay_hf import RelayForMaskedDiffusion, RelayTrainer
from relay_hf.demo.study import trainer_config
from relay_hf.traces import TASKS, decode_traces

START = "start"
COUNTED_STEPS, COUNTED_ROWS = 8, 16  # whose floating-point operations are counted
TRACE_BATCH = 250


@dataclass(frozen=True)
class Arm:
    """How one model of a study is made.

    Args:
        objective: the trainer's.
        options: of the trainer, beside those of the workload.
        channel: `relay_channel` of the model.
        config: further options of `RelayConfig`.
        begins: name of the arm whose model it begins with; None = from scratch, for the steps of a warm start.
        reference: name of the arm whose model is the trainer's `reference_model`.
        on_traces: whether it is trained on right answers of the model it begins with, and not on the workload's texts.
        sizes: what replaces the workload's sizes.
        views: name -> options of further evaluations; `state` names a change of the state, see `STATES`, and
            `reference_model` an arm.
    """

    objective: str
    options: Mapping[str, Any] = field(default_factory=dict)
    channel: str = "layer_norm"
    config: Mapping[str, Any] = field(default_factory=dict)
    begins: str | None = START
    reference: str | None = None
    on_traces: bool = False
    sizes: Mapping[str, Any] = field(default_factory=dict)
    views: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


# What a step gets instead of the state that the one before has left, (rows, positions, width): see `Arm.views`.
STATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "another row": lambda state: state.roll(1, 0),
}


class Runner:
    """Trains and evaluates arms, and keeps what it has made in a folder.

    Args:
        workload: what is trained on and evaluated, see `boards_workload.py`.
        arms: name -> arm; an arm comes after those that it needs.
        folder: where results, models and data are kept.
    """

    def __init__(self, workload: Any, arms: Mapping[str, Arm], folder: Path) -> None:
        self.workload, self.arms, self.folder = workload, arms, folder
        self.results = Results(folder / "results.jsonl")

    def run(self, name: str, seed: int, equal_compute: str | None = None) -> None:
        """Trains and evaluates one arm, unless that is done.

        Args:
            name: the arm.
            seed: of all randomness.
            equal_compute: name of an arm, done before with equal steps, whose training operations the arm may spend;
                None = the steps of the workload.
        """
        budget, arm = "compute" if equal_compute else "steps", self.arms[name]
        if self.results.find(name, seed, budget) is not None:
            return
        steps = self.workload.steps if arm.begins else self.workload.warmup_steps
        if equal_compute:
            same = self.results.find(name, seed, "steps")
            allowed = self.results.find(equal_compute, seed, "steps")["operations"]
            steps = max(round(steps * allowed / same["operations"]), 1)
            if steps == same["steps"]:
                self.results.add(same | {"budget": budget})
                return
        print(f"seed {seed}: {name}, {steps} steps", flush=True)
        set_seed(seed)
        model = self._fresh(arm, seed)
        operations, seconds = self._train(model, arm, seed, steps)
        self._keep(model, name, seed, budget)
        views = {"": {"use_relay": model.config.relay_channel != "none"}, **arm.views}
        curves = {view: self.curve(model, seed, **options) for view, options in views.items()}
        line = {"arm": name, "seed": seed, "budget": budget, "steps": steps, "operations": operations}
        self.results.add({**line, "seconds": seconds, "curves": curves})

    def model_of(self, name: str, seed: int, budget: str = "steps") -> RelayForMaskedDiffusion:
        """The kept model of an arm."""
        return RelayForMaskedDiffusion.from_pretrained(self._path(name, seed, budget))

    def _path(self, name: str, seed: int, budget: str) -> Path:
        return self.folder / f"seed_{seed}" / budget / name.replace(" ", "_")

    def _keep(self, model: RelayForMaskedDiffusion, name: str, seed: int, budget: str) -> None:
        path = self._path(name, seed, budget)
        unfinished = path.with_name(f"{path.name}.unfinished")
        for saved in (model, self.workload.tokenizer):
            saved.save_pretrained(unfinished)
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)

    def _fresh(self, arm: Arm, seed: int) -> RelayForMaskedDiffusion:
        """The model that the arm begins with; a channel that the other has not is untrained."""
        model = self.workload.new_model({"relay_channel": arm.channel, **arm.config}, **arm.sizes)
        if arm.begins:
            model.load_state_dict(self.model_of(arm.begins, seed).state_dict(), strict=False)
        return model

    def _train(self, model: RelayForMaskedDiffusion, arm: Arm, seed: int, steps: int) -> tuple[float, float]:
        """Trains in place; returns its floating-point operations and the processor's seconds."""
        options = self.workload.options(arm.objective, from_scratch=arm.begins is None) | dict(arm.options)
        config = trainer_config(self.folder, steps, seed, **options, disable_tqdm=True)
        rows = self._rows(arm, seed, steps * config.per_device_train_batch_size)
        counter = CountOperations(steps)
        reference = self.model_of(arm.reference, seed) if arm.reference else None
        trainer = RelayTrainer(
            model,
            config,
            train_dataset=rows,
            processing_class=self.workload.tokenizer,
            reference_model=reference,
            callbacks=[counter],
        )
        began = time.process_time()
        trainer.train()
        return counter.operations, time.process_time() - began

    def _rows(self, arm: Arm, seed: int, count: int) -> Dataset:
        before = arm.begins
        depth = 0  # what an arm begins with has seen other rows
        while before is not None:
            before, depth = self.arms[before].begins, depth + 1
        seed_of_rows = 10 * seed + depth
        if not (arm.on_traces and arm.begins):
            return self.workload.texts(count, seed_of_rows)
        return self._traces(self.model_of(arm.begins, seed), self.workload.asked(count, seed_of_rows))

    def _traces(self, model: RelayForMaskedDiffusion, rows: list[dict[str, str]]) -> Dataset:
        """What the model answers, with the steps in which it revealed it, where that is right."""
        task = TASKS[self.workload.check](self.workload.tokenizer, model.config, raw=True)
        right = []
        for first in range(0, len(rows), TRACE_BATCH):
            batch = rows[first : first + TRACE_BATCH]
            traces = decode_traces(model.eval(), [task.prompt(row) for row in batch], self.workload.careful)
            right += [trace for trace, is_right in zip(traces, task.are_right(batch, traces), strict=True) if is_right]
        if not right:
            raise ValueError(
                f"None of the {len(rows)} answers was right, so that nothing is left to learn from: train the arm "
                "before for more steps."
            )
        columns = ("input_ids", "labels", "reveal_steps")
        return Dataset.from_dict({column: [getattr(trace, column) for trace in right] for column in columns})

    def curve(
        self, model: RelayForMaskedDiffusion, seed: int, state: str | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """One evaluation per threshold, with what it cost per row.

        Args:
            model: the model.
            seed: whose models are meant by the names of arms.
            state: key of `STATES`; None = the state that the model leaves.
            options: of `generate`; `reference_model` is the name of an arm.
        """
        if "reference_model" in options:
            options["reference_model"] = self.model_of(options["reference_model"], seed)
        if state is not None:
            next_state, change = model.relay.next_state, STATES[state]
            model.relay.next_state = lambda readings: change(next_state(readings))
        curve, counted = [], min(COUNTED_ROWS, self.workload.test_rows)
        for threshold in self.workload.thresholds:
            with FlopCounterMode(display=False) as counter:
                self.workload.evaluate(model, threshold, counted, **options)
            began = time.perf_counter()
            found = self.workload.evaluate(model, threshold, **options)
            seconds = (time.perf_counter() - began) / self.workload.test_rows
            costs = {"seconds": seconds, "operations": counter.get_total_flops() / counted}
            curve.append({"threshold": threshold, **found, **costs})
        if state is not None:
            del model.relay.next_state
        return curve


class CountOperations(TrainerCallback):
    """Counts the floating-point operations of some steps, spread over the training: forward, backward and reference.

    Args:
        steps: optimizer steps of the training.

    Attributes:
        operations: estimate for all steps.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.counted, self.counter = steps, 0, FlopCounterMode(display=False)
        self.total = 0

    @property
    def operations(self) -> float:
        return self.total / self.counted * self.steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_counted = state.global_step % max(self.steps // COUNTED_STEPS, 1) == 0
        if self.is_counted:
            self.counter.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_counted:
            self.counter.__exit__(None, None, None)
            self.total, self.counted = self.total + self.counter.get_total_flops(), self.counted + 1
