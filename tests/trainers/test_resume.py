"""A run that stops and goes on gives what the uninterrupted run gives: buffer, averages, randomness and all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from relay_hf import RelayForMaskedDiffusion
from relay_hf.trainers import RelayTrainer

from .conftest import build_model

JITTERED = {"threshold_jitter": 0.2, "ema_decay": 0.9, "relay_learning_rate": 1e-2}


def losses(trainer: RelayTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [{"objective": "relay", **JITTERED}, {"objective": "rollout", "threshold_jitter": 0.2}, {"objective": "masked"}],
    ids=lambda options: options["objective"],
)
def test_resume_after_a_stop_equals_the_uninterrupted_run(
    make_trainer: Callable[..., RelayTrainer], tmp_path: Path, options: dict
) -> None:
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **options}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **saving)
    whole.train()

    resumed = make_trainer(build_model(seed=7), output_dir=str(tmp_path / "resumed"), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for (name, mine), (_, theirs) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_resume_without_the_buffer_would_differ(make_trainer: Callable[..., RelayTrainer], tmp_path: Path) -> None:
    """The test above can fail: dropping the buffer's file changes the losses."""
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "unmasking_threshold": 0.9}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **saving)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    (checkpoint / "rollout_buffer_0.safetensors").unlink()
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **saving)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[3:] != losses(whole)[3:]


def test_best_model_at_the_end_is_the_average_that_scored_best(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset
) -> None:
    trainer = make_trainer(
        ema_decay=0.9,
        max_steps=6,
        learning_rate=0.5,
        # The worst loss counts as the best here, so that the best model is the first and not the last.
        greater_is_better=True,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        trainer_options={"eval_dataset": dataset.select(range(8))},
    )
    trainer.train()
    scores = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(scores) > scores[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(scores))


def test_resume_without_an_average_starts_it_from_the_loaded_weights(
    make_trainer: Callable[..., RelayTrainer], tmp_path: Path
) -> None:
    make_trainer(max_steps=2, save_strategy="steps", save_steps=2).train()
    resumed = make_trainer(build_model(seed=7), max_steps=2, ema_decay=0.9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    saved = RelayForMaskedDiffusion.from_pretrained(tmp_path / "run" / "checkpoint-2")
    for mine, theirs in zip(resumed.model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(mine, theirs)
