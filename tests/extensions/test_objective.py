"""An objective of another package is one file: it trains, resumes, and a card describes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relay_hf import RelayForMaskedDiffusion, register_objective
from relay_hf.trainers import Recipe, RelayTrainer
from relay_hf.trainers.objectives import RECIPES, one_step

from ..trainers.conftest import build_dataset, build_model, build_trainer
from ..trainers.test_relay_trainer import logged, weights
from . import objective as module

SHAPES = [{}, {"block_size": None, "token_shift": False, "relay_scope": "all"}]
both_shapes = pytest.mark.parametrize("shape", SHAPES, ids=["blocks", "canvas"])


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., RelayTrainer]:
    def make(objective: str, shape: dict, **options: Any) -> RelayTrainer:
        return build_trainer(tmp_path / "run", build_model(**shape), objective=objective, **options)

    return make


@both_shapes
@pytest.mark.parametrize("objective", ["two_looks", "left_to_right"])
def test_objective_is_trained_with_its_state(
    make_trainer: Callable[..., RelayTrainer], objective: str, shape: dict
) -> None:
    trainer = make_trainer(objective, shape, trainer_options={"eval_dataset": build_dataset().select(range(8))})
    before = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == before
    weight = trainer.model.relay.norm.weight.detach().clone()
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert (trainer.model.relay.norm.weight != weight).all()


@both_shapes
def test_second_look_gets_the_state_of_the_first(make_trainer: Callable[..., RelayTrainer], shape: dict) -> None:
    trainer = make_trainer("two_looks", shape, max_steps=1)
    trainer.train()
    (first,), (second,) = logged(trainer, "loss_step_1"), logged(trainer, "loss_step_2")
    assert first != pytest.approx(second, rel=1e-3)
    assert trainer.buffer.rows is None, "its rows are not kept"


def test_rows_of_a_rollout_are_kept_until_they_are_revealed(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer("left_to_right", SHAPES[0], max_steps=2, rollout_steps=3, staggered_start=False)
    trainer.train()
    rows = trainer.buffer.rows
    assert rows.masked.sum(-1).tolist() == [3] * 4, "9 learned positions, less 2 times 3"
    assert rows.relay_state.abs().sum() > 0


@both_shapes
@pytest.mark.parametrize("objective", ["two_looks", "left_to_right"])
def test_resumed_training_equals_the_uninterrupted_one(
    make_trainer: Callable[..., RelayTrainer], objective: str, shape: dict
) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    whole, resumed = (make_trainer(objective, shape, **options) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    for name, tensor in weights(resumed.model).items():
        assert torch.equal(tensor, weights(whole.model)[name]), name
    loaded = RelayForMaskedDiffusion.from_pretrained(Path(whole.args.output_dir) / "checkpoint-4")
    assert torch.equal(loaded.relay.norm.weight, whole.model.relay.norm.weight)


def test_card_and_summary_describe_and_cite_it(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer("two_looks", SHAPES[0])
    trainer.create_model_card("looks")
    card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    assert "with the objective `two_looks` (two looks at the same masks, the second with" in card
    assert "@misc{somebody2026looks," in card
    assert "two_looks (two looks at the same masks" in trainer.summary()
    assert "3 denoising steps per rollout" in make_trainer("left_to_right", SHAPES[0], rollout_steps=3).summary()


@pytest.mark.parametrize("channel", ["none", "residual_context"])
def test_channel_that_cannot_serve_it_raises(tmp_path: Path, channel: str) -> None:
    message = rf"`objective='two_looks'` needs a channel that can be differentiated.*'{channel}'.*'layer_norm'.*"
    with pytest.raises(ValueError, match=message + "'masked'"):
        build_trainer(tmp_path, build_model(relay_channel=channel), objective="two_looks")


# -- registration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "recipe", "message"),
    [
        (
            "relay",
            Recipe("another", one_step),
            r"`objective='relay'` is taken \(the state is.*: choose another",
        ),
        ("mine", "masked", r"`relay_hf.register_objective\('mine', ...\)` was given 'masked': give a `Recipe`"),
        ("", Recipe("mine", one_step), "was given the name '': give a text, the `objective` to be"),
    ],
)
def test_register_objective_what_cannot_be_raises(name: Any, recipe: Any, message: str) -> None:
    before = dict(RECIPES)
    with pytest.raises(ValueError, match=message):
        register_objective(name, recipe)
    assert before == RECIPES


def test_register_objective_defined_again_replaces_the_former(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's cell that runs twice."""
    monkeypatch.setitem(RECIPES, "two_looks", RECIPES["two_looks"])
    again = Recipe(RECIPES["two_looks"].sentence, lambda *_: module.two_looks(*_), start=module.mask_every_other)
    register_objective("two_looks", again)
    assert RECIPES["two_looks"] is again
