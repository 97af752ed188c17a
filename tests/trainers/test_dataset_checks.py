"""Data that cannot be learned from is refused when the trainer is built, not in the middle of a run."""

from collections.abc import Callable

import pytest
import torch
from datasets import Dataset

from relay_hf.trainers import RelayTrainer
from relay_hf.trainers.rows import fresh_rows

from .conftest import MASK, build_model, build_rows


def spoiled(kind: str) -> dict[str, torch.Tensor]:
    """Eight rows, of which the sixth cannot be learned from."""
    rows = build_rows(8)
    if kind == "unlabelled":
        rows["labels"][5] = -100
    elif kind == "shifted":
        rows["labels"][5, 4] += 1
    elif kind == "mask":
        rows["input_ids"][5, 6] = rows["labels"][5, 6] = MASK
    return rows


def to_dataset(rows: dict[str, torch.Tensor]) -> Dataset:
    return Dataset.from_dict({name: rows[name].tolist() for name in ("input_ids", "labels")})


MESSAGES = {
    "unlabelled": "1 of 8 rows of the {} have no label but -100, the first of them row 5",
    "shifted": "Labels of the {} differ from the `input_ids`",
    "mask": r"The {} has the mask token \(id 39\) among what is to be learned",
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_trainer_training_set_with_a_bad_row_raises(make_trainer: Callable[..., RelayTrainer], kind: str) -> None:
    with pytest.raises(ValueError, match=MESSAGES[kind].format("training set")):
        make_trainer(data=to_dataset(spoiled(kind)), max_length=None)


@pytest.mark.parametrize("kind", MESSAGES)
def test_trainer_evaluation_set_with_a_bad_row_raises(make_trainer: Callable[..., RelayTrainer], kind: str) -> None:
    sets = {"good": to_dataset(build_rows(4)), "bad": to_dataset(spoiled(kind))}
    with pytest.raises(ValueError, match=MESSAGES[kind].format("data set `bad`")):
        make_trainer(max_length=None, trainer_options={"eval_dataset": sets})


def test_trainer_bad_rows_that_were_not_selected_are_no_concern(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer(data=to_dataset(spoiled("unlabelled")).select([7, 0, 3, 1]), max_length=None)
    assert len(trainer.train_dataset) == 4


@pytest.mark.parametrize("kind", ["shifted", "mask"])
def test_fresh_rows_bad_batch_of_a_stream_raises(kind: str) -> None:
    with pytest.raises(ValueError, match=MESSAGES[kind].format("batch")):
        fresh_rows(build_model().config, spoiled(kind), carries_state=True)
