"""What is interrupted in the middle of a step goes on as if it had never been."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from relay_hf.trainers import RelayTrainer
from relay_hf.trainers.interruption import SaveOnInterrupt

from .conftest import build_model, build_trainer
from .killed_run import SETTINGS
from .test_resume import losses


def interrupt_in_step(trainer: RelayTrainer, step: int, number: int = signal.SIGINT, times: int = 1) -> None:
    """Sends the signal from inside the loss of that step, once per signal."""
    compute_loss = trainer.compute_loss
    left = [times]

    def interrupted_loss(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        while trainer.state.global_step == step - 1 and left[0]:
            left[0] -= 1
            os.kill(os.getpid(), number)
        return loss

    trainer.compute_loss = interrupted_loss


def run(trainer: RelayTrainer) -> SaveOnInterrupt:
    with SaveOnInterrupt(trainer) as interruption:
        trainer.train()
    return interruption


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> RelayTrainer:
    trainer = build_trainer(tmp_path_factory.mktemp("uninterrupted"), **SETTINGS)
    trainer.train()
    return trainer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "options", [{}, {"save_strategy": "no", "save_only_model": True}], ids=["saving", "not saving"]
)
def test_resume_after_an_interruption_in_a_step_equals_the_uninterrupted_run(
    uninterrupted: RelayTrainer, tmp_path: Path, number: int, options: dict[str, Any]
) -> None:
    before = signal.getsignal(number)
    trainer = build_trainer(tmp_path, **{**SETTINGS, **options})
    interrupt_in_step(trainer, 3, number)
    interruption = run(trainer)
    assert interruption.checkpoint == tmp_path / "checkpoint-3"
    assert trainer.state.global_step == 3, "the step is finished, and no other begun"
    assert signal.getsignal(number) is before

    resumed = build_trainer(tmp_path, build_model(seed=7), **SETTINGS)
    resumed.train(resume_from_checkpoint=str(interruption.checkpoint))
    assert losses(resumed) == losses(uninterrupted)
    for mine, theirs in zip(resumed.model.parameters(), uninterrupted.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_second_interruption_stops_at_once(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer()
    before = signal.getsignal(signal.SIGINT)
    interrupt_in_step(trainer, 2, times=2)
    with pytest.raises(KeyboardInterrupt):
        run(trainer)
    assert trainer.state.global_step == 1
    assert signal.getsignal(signal.SIGINT) is before
    assert not any(isinstance(c, SaveOnInterrupt) for c in trainer.callback_handler.callbacks)


def test_interruption_in_the_last_step_leaves_a_finished_run(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer(max_steps=2)
    interrupt_in_step(trainer, 2)
    assert run(trainer).checkpoint is None
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(("step", "evaluations"), [(1, 0), (2, 1)])
def test_interruption_evaluates_only_at_the_end_of_an_epoch(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset, step: int, evaluations: int
) -> None:
    trainer = make_trainer(
        data=dataset.select(range(8)),
        max_steps=4,
        unmasking_threshold=0.0,  # four rows are finished in each step
        staggered_start=False,
        eval_strategy="epoch",
        trainer_options={"eval_dataset": dataset.select(range(4))},
    )
    interrupt_in_step(trainer, step)
    assert run(trainer).checkpoint is not None
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == evaluations


def test_interruption_between_two_steps_stops_after_the_next(make_trainer: Callable[..., RelayTrainer]) -> None:
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = make_trainer()
    trainer.add_callback(Interrupt())
    assert run(trainer).checkpoint == Path(trainer.args.output_dir) / "checkpoint-2"
