"""An epoch is an epoch: every row revealed once, and evaluations, checkpoints, schedule and counts follow that."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers.optimization import get_linear_schedule_with_warmup

from relay_hf.trainers import RelayTrainer
from relay_hf.trainers.rollouts.batches import NO_NUMBER
from relay_hf.trainers.rollouts.rows import RolloutRows

from .conftest import build_model

EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "unmasking_threshold": 0.9, "staggered_start": False}


def run(trainer: RelayTrainer, **options: Any) -> tuple[RelayTrainer, Counter[int]]:
    """Trains; also returns how often each counted row was finished, by its number."""
    finished, buffer, store = Counter[int](), trainer.buffer, trainer.buffer.store

    def note(rows: RolloutRows) -> None:
        ended = zip(buffer.numbers, (buffer.rows.masked.any(-1) & ~rows.masked.any(-1)).tolist(), strict=True)
        finished.update(number for number, is_ended in ended if is_ended and number != NO_NUMBER)
        store(rows)

    buffer.store = note
    trainer.train(**options)
    buffer.store = store
    return trainer, finished


def logged(trainer: RelayTrainer, name: str) -> list[Any]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("options", [{}, {"staggered_start": True}, {"gradient_accumulation_steps": 3}])
def test_epochs_reveal_every_row_once_each(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset, options: dict[str, Any]
) -> None:
    trainer, finished = run(make_trainer(data=dataset.select(range(23)), **{**EPOCHS, **options}))
    assert finished == Counter(range(46))
    state, refills = trainer.state, logged(trainer, "buffer_refills")
    assert (state.epoch, state.max_steps) == (2, state.global_step)
    again = 4 if options.get("staggered_start") else 0
    assert sum(refills) * options.get("gradient_accumulation_steps", 1) == pytest.approx(46 + again)
    assert min(trainer.buffer.look()[0]) == max(trainer.buffer.look()[0]) == 0


def test_fraction_of_an_epoch_reveals_as_much(make_trainer: Callable[..., RelayTrainer], dataset: Dataset) -> None:
    trainer, finished = run(make_trainer(data=dataset.select(range(10)), **{**EPOCHS, "num_train_epochs": 1.5}))
    assert finished == Counter(range(15))
    assert trainer.state.epoch == 1.5


def test_fewer_rows_than_places_end_as_well(make_trainer: Callable[..., RelayTrainer], dataset: Dataset) -> None:
    trainer, finished = run(make_trainer(data=dataset.select(range(3)), **EPOCHS))
    assert (finished, trainer.state.epoch) == (Counter(range(6)), 2)


def test_evaluations_and_checkpoints_come_at_the_ends_of_epochs(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset, tmp_path: Path
) -> None:
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "trainer_options": {"eval_dataset": dataset}}
    trainer, _ = run(make_trainer(data=dataset.select(range(16)), **EPOCHS, **options))
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["epoch"] for entry in evaluated] == [1, 2]
    saved = {f"checkpoint-{entry['step']}" for entry in evaluated}
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == saved


def test_epoch_grows_with_what_is_revealed(make_trainer: Callable[..., RelayTrainer], dataset: Dataset) -> None:
    trainer, _ = run(make_trainer(data=dataset.select(range(16)), **EPOCHS))
    epochs = logged(trainer, "epoch")
    assert epochs == sorted(epochs)
    assert 0 < epochs[0] < 0.5
    assert len([epoch for epoch in epochs if epoch == 1]) <= 1


def test_steps_alone_end_a_run_that_counts_steps(make_trainer: Callable[..., RelayTrainer], dataset: Dataset) -> None:
    trainer, finished = run(make_trainer(data=dataset.select(range(8)), **{**EPOCHS, "max_steps": 30}))
    assert (trainer.state.global_step, trainer.state.max_steps) == (30, 30)
    assert max(finished.values()) == 1
    assert trainer.state.epoch > 2


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_learning_rate_ends_with_the_rows(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset, kind: str
) -> None:
    options = {**EPOCHS, "lr_scheduler_type": kind, "warmup_steps": 3, "learning_rate": 1.0, "optim": "sgd"}
    trainer, _ = run(make_trainer(data=dataset.select(range(40)), relay_learning_rate=0.5, **options))
    rates = logged(trainer, "learning_rate")
    assert rates[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert rates[-1] < 0.05 < rates[len(rates) // 2]


def test_scheduler_of_the_user_stays_as_it_is(make_trainer: Callable[..., RelayTrainer], dataset: Dataset) -> None:
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    own = {"optimizers": (optimizer, get_linear_schedule_with_warmup(optimizer, 0, 1000))}
    trainer, _ = run(make_trainer(model, dataset.select(range(8)), own, **EPOCHS))
    assert logged(trainer, "learning_rate")[:2] == pytest.approx([1, 0.999])


def test_resume_in_the_middle_of_an_epoch_equals_the_uninterrupted_run(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset, tmp_path: Path
) -> None:
    options = {
        **EPOCHS,
        "save_strategy": "steps",
        "save_steps": 1,
        "threshold_jitter": 0.2,
        "data": dataset.select(range(16)),
    }
    whole, first = run(make_trainer(output_dir=tmp_path / "whole", **options))
    for step in (1, whole.state.global_step // 2, whole.state.global_step - 1):
        resumed, second = run(
            make_trainer(build_model(seed=7), output_dir=tmp_path / str(step), **options),
            resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"),
        )
        for name in ("loss", "learning_rate", "epoch"):
            assert logged(resumed, name) == logged(whole, name), (step, name)
        assert set(second) <= set(first)


def test_resume_in_the_middle_of_a_stream_equals_the_uninterrupted_run(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset, tmp_path: Path
) -> None:
    options = {**EPOCHS, "max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    options["data"] = dataset.select(range(6)).to_iterable_dataset().shuffle(seed=3, buffer_size=4)
    whole, _ = run(make_trainer(output_dir=tmp_path / "whole", **options))
    resumed, _ = run(
        make_trainer(build_model(seed=7), output_dir=tmp_path / "resumed", **options),
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"),
    )
    assert whole.state.epoch > 1
    for name in ("loss", "epoch"):
        assert logged(resumed, name) == pytest.approx(logged(whole, name), rel=1e-12)


def test_resume_of_a_finished_run_takes_no_step(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset, tmp_path: Path
) -> None:
    options = {**EPOCHS, "save_strategy": "epoch", "data": dataset.select(range(8)), "num_train_epochs": 1.5}
    whole, _ = run(make_trainer(**options))
    last = tmp_path / "run" / f"checkpoint-{whole.state.global_step}"
    resumed, _ = run(make_trainer(build_model(seed=7), **options), resume_from_checkpoint=str(last))
    assert resumed.state.global_step == whole.state.global_step
    more, finished = run(make_trainer(**{**options, "num_train_epochs": 3}), resume_from_checkpoint=str(last))
    assert (finished, more.state.epoch) == (Counter(range(12, 24)), 3)


def test_resume_without_the_rows_of_a_process_raises(make_trainer: Callable[..., RelayTrainer], tmp_path: Path) -> None:
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    tensors = load_file(checkpoint / "rollout_buffer_0.safetensors")
    tensors["source_dealt"][-1] = 3
    save_file(tensors, checkpoint / "rollout_buffer_0.safetensors")
    with pytest.raises(ValueError, match=r"is of 3 processes, and `rollout_buffer_1\.safetensors` is missing"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(checkpoint))


def test_second_training_begins_anew(make_trainer: Callable[..., RelayTrainer], dataset: Dataset) -> None:
    trainer, _ = run(make_trainer(data=dataset.select(range(8)), **EPOCHS))
    assert run(trainer)[1] == Counter(range(16))
