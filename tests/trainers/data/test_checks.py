"""Data that cannot be learned from is refused when the trainer is built, not in the middle of a run."""

from collections.abc import Callable

import pytest
import torch
from datasets import Dataset

from relay_hf.trainers import RelayTrainer
from relay_hf.trainers.rollouts.rows import fresh_rows

from ..conftest import MASK, build_model, build_rows


def spoiled(kind: str) -> dict[str, torch.Tensor]:
    """Eight rows, of which the sixth cannot be learned from."""
    rows = build_rows(8)
    if kind == "unlabelled":
        rows["labels"][5] = -100
    elif kind == "shifted":
        rows["labels"][5, 4] += 1
    elif kind == "mask":
        rows["input_ids"][5, 6] = rows["labels"][5, 6] = MASK
    elif kind == "unknown":
        rows["input_ids"][5, 1] = 40
    return rows


def to_dataset(rows: dict[str, torch.Tensor]) -> Dataset:
    return Dataset.from_dict({name: rows[name].tolist() for name in ("input_ids", "labels")})


MESSAGES = {
    "unlabelled": "1 of 8 rows of the {} have no label but -100, the first of them row 5",
    "shifted": "Row 5 of the {} has labels that differ from the `input_ids`",
    "mask": r"Row 5 of the {} has the mask token \(id 39\) among what is to be learned",
    "unknown": "Row 5 of the {} has the token id 40, but the model has 40 tokens",
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


def test_evaluate_with_a_bad_row_raises(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer(max_length=None)
    with pytest.raises(ValueError, match=MESSAGES["unknown"].format("data set `eval`")):
        trainer.evaluate(to_dataset(spoiled("unknown")))


def spoiled_batch(kind: str) -> dict[str, torch.Tensor]:
    """As a data collator of the user's could make it."""
    batch = spoiled(kind)
    batch["attention_mask"][5, -3:] = 0
    batch["labels"][5, -3:] = -100
    if kind == "gap":
        batch["attention_mask"][5, -1] = 1
    elif kind == "left":
        batch["attention_mask"][5] = batch["attention_mask"][5].flip(0)
    elif kind == "learned padding":
        batch["labels"][5, -1] = batch["input_ids"][5, -1]
    elif kind == "narrow":
        batch["labels"] = batch["labels"][:, 1:]
    elif kind == "extra":
        batch["position_ids"] = torch.arange(12).expand(8, 12)
    return batch


BATCHES = {
    "shifted": "The batch has labels that differ from the `input_ids`",
    "mask": r"The batch has the mask token \(id 39\) among what is to be learned",
    "unknown": "The batch has the token id 40, but the model has 40 tokens",
    "gap": "The batch has padding between tokens",
    "left": "The batch is padded on the left",
    "learned padding": "The batch has labels at padding",
    "narrow": r"`input_ids` of shape \(8, 12\), `labels` of \(8, 11\)",
    "extra": r"The batch has \['position_ids'\], which the rollout does not read",
}


@pytest.mark.parametrize("kind", BATCHES)
def test_fresh_rows_bad_batch_raises(kind: str) -> None:
    with pytest.raises(ValueError, match=BATCHES[kind]):
        fresh_rows(build_model().config, spoiled_batch(kind), keeps_state=True)


def test_fresh_rows_batch_with_padding_on_the_right_is_taken() -> None:
    assert len(fresh_rows(build_model().config, spoiled_batch("none"), keeps_state=True)) == 8
