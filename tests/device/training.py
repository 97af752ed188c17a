"""Trainers of tiny models on the test device, and on the CPU to compare them with."""

from pathlib import Path
from typing import Any

import pytest

from relay_hf.trainers import RelayTrainer

from ..trainers.conftest import build_model_for, build_trainer
from . import fakegpu


def train(
    patch: pytest.MonkeyPatch,
    place: str,
    folder: Path,
    objective: str,
    model: dict | None = None,
    resumes: bool = False,
    **options: Any,
) -> RelayTrainer:
    """Four steps of training from seeded weights; `options` are those of `build_trainer`.

    Args:
        patch: of the test.
        place: "cpu" or the name of the device.
        folder: where the run may write.
        objective: what is learned.
        model: fields of the model's configuration.
        resumes: go on from the last checkpoint of the folder.
    """
    fakegpu.default_to(place, patch)
    options = {"use_cpu": place == "cpu", "bf16": False, "gradient_checkpointing": False, **options}
    trainer = build_trainer(folder / place, build_model_for(objective, **(model or {})), objective=objective, **options)
    trainer.train(resume_from_checkpoint=resumes or None)
    expected = "cpu" if place == "cpu" else fakegpu.NAME
    assert {parameter.device.type for parameter in trainer.model.parameters()} == {expected}
    return trainer


def losses_of(trainer: RelayTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
