from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from huggingface_hub import ModelCard

from relay_hf.trainers import Objective, RelayTrainer
from relay_hf.trainers.objectives import RECIPES

from .conftest import build_model


def test_card_describes_every_objective() -> None:
    assert set(RECIPES) == set(get_args(Objective))


@pytest.mark.parametrize("objective", ["relay", "masked"])
def test_checkpoint_writes_a_card_of_what_ran(make_trainer: Callable[..., RelayTrainer], objective: str) -> None:
    trainer = make_trainer(objective=objective, save_strategy="steps", save_steps=2, learning_rate=3e-4)
    trainer.train()
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert f"| `objective` | `{objective}` |" in card.content
    assert "| `learning_rate` | `0.0003` |" in card.content
    assert "- Steps: 4" in card.content
    assert "None" not in card.content
    assert {"relay_hf", "relay"} <= set(card.data.tags)


def test_card_of_a_model_without_channel_does_not_claim_one(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer(build_model(relay_channel="none"), objective="rollout")
    trainer.create_model_card("plain", tags="mine")
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert "mine" in card.data.tags
    assert "relay" not in card.data.tags
    assert "carries" not in card.content
