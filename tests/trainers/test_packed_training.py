"""`packing=True` trains what padded rows train, on fewer positions; a resumed run gives what a whole one gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from relay_hf.trainers import RelayTrainer

from .conftest import MASK, build_model, build_model_for
from .test_resume import losses

PACKED = {"packing": True, "max_length": 16}


@pytest.fixture
def texts() -> Dataset:
    """48 texts of 5 to 7 tokens or of 16, of which the first two are not learned."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 16, 6, 7] * 12
    ids = [torch.randint(3, MASK, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *text[2:]] for text in ids]})


def shapes_of_passes(trainer: RelayTrainer) -> list[tuple[int, int]]:
    """Rows and positions of every pass of the backbone from now on."""
    seen: list[tuple[int, int]] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    trainer.accelerator.unwrap_model(trainer.model).model.register_forward_pre_hook(record, with_kwargs=True)
    return seen


@pytest.mark.parametrize("block_size", [4, None])
@pytest.mark.parametrize("objective", ["masked", "complementary", "residual_context"])
def test_packing_trains_what_padded_rows_train(
    make_trainer: Callable[..., RelayTrainer], texts: Dataset, objective: str, block_size: int | None
) -> None:
    trained, positions = [], []
    for options in ({}, PACKED):
        model = build_model_for(objective, block_size=block_size)
        trainer = make_trainer(model, texts, objective=objective, max_steps=2, per_device_train_batch_size=8, **options)
        seen = shapes_of_passes(trainer)
        trainer.train()
        trained.append((losses(trainer), dict(trainer.model.named_parameters())))
        positions.append(sum(rows * columns for rows, columns in seen))
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-4, atol=1e-5)
    assert positions[1] < positions[0]
    assert trainer.state.log_history[0]["padding"] < 0.4


@pytest.mark.parametrize(("options", "is_packed"), [({}, True), ({"eval_packing": False}, False)])
def test_evaluation_packed_gives_the_padded_loss(
    make_trainer: Callable[..., RelayTrainer], texts: Dataset, options: dict, is_packed: bool
) -> None:
    results, rows = [], []
    for packing in ({}, {**PACKED, **options}):
        trainer = make_trainer(trainer_options={"eval_dataset": texts}, **packing)
        seen = shapes_of_passes(trainer)
        results.append(trainer.evaluate())
        rows.append(sum(count for count, _ in seen))
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], rel=1e-5)
    assert (rows[1] < rows[0]) == is_packed


@pytest.mark.parametrize("objective", ["relay", "masked"])
def test_resume_with_packing_equals_the_uninterrupted_run(
    make_trainer: Callable[..., RelayTrainer], texts: Dataset, tmp_path: Path, objective: str
) -> None:
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "objective": objective, **PACKED}
    whole = make_trainer(None, texts, output_dir=tmp_path / "whole", **saving)
    whole.train()
    resumed = make_trainer(build_model(seed=7), texts, output_dir=tmp_path / "resumed", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)


def test_packing_texts_stay_apart_in_the_data_set(make_trainer: Callable[..., RelayTrainer], texts: Dataset) -> None:
    trainer = make_trainer(None, texts, **PACKED)
    assert trainer.train_dataset["input_ids"] == texts["input_ids"]
    assert trainer.args.packing


def test_packing_holds_more_texts_and_reveals_each_once_an_epoch(
    make_trainer: Callable[..., RelayTrainer], texts: Dataset
) -> None:
    options = {"max_steps": -1, "num_train_epochs": 1, "staggered_start": False, "logging_steps": 10}
    trainer = make_trainer(None, texts.select(range(16)), **options, **PACKED)
    held: list[int] = []
    refill = trainer.buffer.refill
    trainer.buffer.refill = lambda *a, **k: (refill(*a, **k), held.append(sum(map(bool, trainer.buffer.lengths))))[0]
    trainer.train()
    assert max(held) > 4, "more texts than rows"
    assert trainer.buffer.entered == 16
    assert not trainer.buffer.rows.masked.any()
