"""A run that trains nothing does not end like one that did what it was asked."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset

from relay_hf.trainers import RelayTrainer


@pytest.mark.parametrize("rows_on_demand", [True, False])
def test_train_set_smaller_than_the_batch_that_is_dropped_raises(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset, rows_on_demand: bool
) -> None:
    options = {"dataloader_drop_last": True, "rows_on_demand": rows_on_demand}
    trainer = make_trainer(data=dataset.select(range(3)), **options)
    with pytest.raises(ValueError, match=r"fewer rows than a batch \(4\).*`dataloader_drop_last=True`"):
        trainer.train()


def test_train_stream_that_gives_no_batch_raises(make_trainer: Callable[..., RelayTrainer]) -> None:
    """A generator that was used up by the checks before, for instance."""
    trainer = make_trainer(objective="masked")
    trainer.get_train_dataloader = lambda: DataLoader(NoRows(), batch_size=4)
    with pytest.raises(ValueError, match="gave no batch, so none of 4 steps was made"):
        trainer.train()


class NoRows(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_train_stream_that_gives_no_row_raises(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(data=dataset.to_iterable_dataset())
    monkeypatch.setattr(trainer, "train_dataset", trainer.train_dataset.take(0))
    with pytest.raises(ValueError, match="The training set gave no row: check where it is loaded from"):
        trainer.train()


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"max_steps": -1, "num_train_epochs": 0}])
def test_config_without_a_step_raises(make_trainer: Callable[..., RelayTrainer], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="trains nothing: give a positive number"):
        make_trainer(**options)
