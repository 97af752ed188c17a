"""A run that trains nothing, or less than its epochs promise, does not end like one that did what it was asked."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset

from relay_hf.trainers import RelayTrainer

from .conftest import build_model


def test_train_set_smaller_than_the_batch_that_is_dropped_raises(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset
) -> None:
    trainer = make_trainer(data=dataset.select(range(3)), dataloader_drop_last=True)
    with pytest.raises(ValueError, match=r"fewer rows than a batch \(4\).*`dataloader_drop_last=True`"):
        trainer.train()


def test_train_stream_that_gives_no_batch_raises(make_trainer: Callable[..., RelayTrainer]) -> None:
    """A generator that was used up by the checks before, for instance."""
    trainer = make_trainer()
    trainer.get_train_dataloader = lambda: DataLoader(NoRows(), batch_size=4)
    with pytest.raises(ValueError, match="gave no batch, so none of 4 steps was made"):
        trainer.train()


class NoRows(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"max_steps": -1, "num_train_epochs": 0}])
def test_config_without_a_step_raises(make_trainer: Callable[..., RelayTrainer], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="trains nothing: give a positive number"):
        make_trainer(**options)


@pytest.mark.parametrize(("queue", "dropped"), [(4096, 0), (5, 1)])
def test_epochs_that_leave_rows_untrained_say_how_many(
    make_trainer: Callable[..., RelayTrainer],
    dataset: Dataset,
    caplog: pytest.LogCaptureFixture,
    queue: int,
    dropped: int,
) -> None:
    options: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 1, "unmasking_threshold": 1.0}
    trainer = make_trainer(data=dataset.select(range(24)), buffer_queue_size=queue, staggered_start=False, **options)
    trainer.train()
    buffer = trainer.buffer
    entered = sum(entry.get("buffer_refills", 0) for entry in trainer.state.log_history)
    assert buffer.entered == entered
    assert buffer.entered + len(buffer.queue) + buffer.dropped == 24
    assert (buffer.dropped > 0) == bool(dropped)
    assert f"{24 - entered:.0f} of 24 rows that were drawn in 1 epochs were not trained" in caplog.text


@pytest.mark.parametrize("options", [{"objective": "masked", "max_steps": -1, "num_train_epochs": 1}, {"max_steps": 2}])
def test_run_that_does_what_it_was_asked_warns_of_nothing(
    make_trainer: Callable[..., RelayTrainer],
    dataset: Dataset,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
) -> None:
    make_trainer(data=dataset.select(range(8)), **options).train()
    assert "were not trained" not in caplog.text


def test_counts_of_the_buffer_survive_a_resume(make_trainer: Callable[..., RelayTrainer]) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "buffer_queue_size": 3, "unmasking_threshold": 1.0}
    whole = make_trainer(**saving)
    whole.train()
    resumed = make_trainer(build_model(seed=7), **saving)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert whole.buffer.dropped > 0
    assert (resumed.buffer.entered, resumed.buffer.dropped) == (whole.buffer.entered, whole.buffer.dropped)
