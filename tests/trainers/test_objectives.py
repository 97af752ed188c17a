from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from relay_hf.modeling import make_policy
from relay_hf.trainers import RelayTrainerConfig
from relay_hf.trainers.model_preparation import keep_caches_under_checkpointing
from relay_hf.trainers.objectives import RECIPES, mean_of_positions, mean_of_rows
from relay_hf.trainers.rollouts.denoiser import make_denoiser
from relay_hf.trainers.rollouts.noise import mask_uniformly
from relay_hf.trainers.rollouts.rollout import Reveal, Rollout, complement, stay
from relay_hf.trainers.rollouts.rows import RolloutRows, fresh_rows

from .conftest import OBJECTIVES, begin_rollout, build_model, build_rows


def random_rows(model: Any, count: int = 4, seed: int = 0, **options: Any) -> RolloutRows:
    rows = fresh_rows(model.config, build_rows(count, seed=seed, **options), keeps_state=True)
    return mask_uniformly(rows, model.config, [torch.Generator().manual_seed(seed + row) for row in range(count)])


def gradients(model: Any, rollout: Rollout) -> dict[str, Tensor]:
    model.zero_grad()
    while rollout.windows_left:
        rollout.run_window().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_objective_of_the_library_is_documented() -> None:
    ours = {name for name, recipe in RECIPES.items() if recipe.advances.__module__.startswith("relay_hf.")}
    assert ours == {*OBJECTIVES, "traces"}  # whose rows are those of `test_traces.py`
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (field,) = (field for field in fields(RelayTrainerConfig) if field.name == "objective")
    for name in ours:
        assert f"| `{name}` |" in page
        assert f'`"{name}"`' in RelayTrainerConfig.__doc__
        assert name in field.metadata["help"]


def test_complementary_learns_every_position_once() -> None:
    model = build_model()
    rows = random_rows(model)
    rollout = begin_rollout(model, rows, [], "complementary")
    loss = rollout.run_window()
    first, second = rollout.step_masked
    assert torch.equal(first | second, rows.learned)
    assert not (first & second).any()
    # The mean over all learned positions, each from the view in which it is hidden.
    total = torch.tensor(0.0)
    for masked in (first, second):
        plain = begin_rollout(model, replace(rows, masked=masked), [], "masked")
        total = total + plain.run_window().detach() * masked.sum()
    torch.testing.assert_close(loss.detach(), total / rows.learned.sum())


@pytest.mark.parametrize("objective", ["relay_sg", "rollout", "complementary"])
@pytest.mark.parametrize("overrides", [{}, {"block_size": None, "token_shift": False}])
def test_window_of_one_changes_nothing_where_no_gradient_crosses(objective: str, overrides: dict) -> None:
    model = build_model(**overrides)
    rows = random_rows(model)
    policies = [make_policy("confidence_threshold", 0.3)] * 3
    whole = gradients(model, begin_rollout(model, rows, policies, objective))
    cut = gradients(model, begin_rollout(model, rows, policies, objective, 1))
    for name, expected in whole.items():
        torch.testing.assert_close(cut[name], expected, rtol=1e-4, atol=1e-5)


def test_window_shorter_than_the_rollout_cuts_the_gradient_of_the_state() -> None:
    model = build_model()
    rows = random_rows(model)
    policies = [make_policy("confidence_threshold", 0.3)] * 4
    of_window = {w: gradients(model, begin_rollout(model, rows, policies, "relay", w)) for w in (None, 4, 2, 1)}
    cut = gradients(model, begin_rollout(model, rows, policies, "relay_sg"))
    name = "model.embed_tokens.weight"
    assert torch.equal(of_window[4][name], of_window[None][name])
    assert not torch.allclose(of_window[2][name], of_window[None][name], rtol=1e-3)
    torch.testing.assert_close(of_window[1][name], cut[name], rtol=1e-4, atol=1e-5)


def test_windows_and_checkpointing_together_give_the_same() -> None:
    model = build_model().train()
    rows = random_rows(model)
    policies = [make_policy("confidence_threshold", 0.3)] * 3
    plain = gradients(model, begin_rollout(model, rows, policies, "relay", 2))
    model.gradient_checkpointing_enable()
    keep_caches_under_checkpointing(model)
    again = gradients(model, begin_rollout(model, rows, policies, "relay", 2))
    for name, expected in plain.items():
        torch.testing.assert_close(again[name], expected, rtol=1e-4, atol=1e-5)


def test_windows_are_counted() -> None:
    model = build_model()
    rollout = begin_rollout(model, random_rows(model), [make_policy("confidence_threshold", 0.3)] * 5, "relay", 2)
    left = []
    while rollout.windows_left:
        left.append(rollout.windows_left)
        rollout.run_window().backward()
    assert left == [3, 2, 1]
    assert len(rollout.step_losses) == 5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), sub_block=st.sampled_from([1, 2, 4]), threshold=st.sampled_from([0.0, 0.5, 1.0]))
def test_reveal_of_sub_blocks_is_left_to_right(seed: int, sub_block: int, threshold: float) -> None:
    """As decoding does: within a block only its earliest sub-block with masks is touched."""
    model = build_model()
    rows = random_rows(model, seed=seed, length=14)
    confidence = torch.rand(rows.masked.shape, generator=torch.Generator().manual_seed(seed))
    after = Reveal(make_policy("confidence_threshold", threshold), 4, sub_block)(rows, confidence)
    revealed = rows.masked & ~after.masked
    for row in range(len(rows)):
        for begin in range(0, 14, 4):
            masked = rows.masked[row, begin : begin + 4].nonzero()[:, 0] // sub_block
            touched = revealed[row, begin : begin + 4].nonzero()[:, 0] // sub_block
            assert set(touched.tolist()) == ({int(masked[0])} if len(masked) else set())


def test_mean_of_rows_does_not_depend_on_how_rows_are_batched() -> None:
    model = build_model()
    rows = random_rows(model)
    for objective in ("masked", "complementary"):
        recipe = RECIPES[objective]

        def evaluate(rows: RolloutRows, recipe: Any = recipe) -> float:
            denoiser = make_denoiser(model, model.config, rows)
            rollout = Rollout(denoiser, rows, [complement, stay], recipe.carry, mean_of_rows(recipe))
            return rollout.run_window().item()

        alone = [evaluate(rows.map(lambda tensor, row=row: tensor[row : row + 1])) for row in range(4)]
        assert evaluate(rows) == pytest.approx(sum(alone) / 4, rel=1e-5)


def test_mean_of_positions_of_two_processes_is_that_of_one() -> None:
    model = build_model()
    rows = random_rows(model)
    recipe = RECIPES["masked"]

    def loss(rows: RolloutRows, share: Any) -> float:
        reduce_loss = mean_of_positions(recipe, share)
        denoiser = make_denoiser(model, model.config, rows)
        return Rollout(denoiser, rows, [stay], recipe.carry, reduce_loss).run_window().item()

    halves = [rows.map(lambda tensor, part=part: tensor[part]) for part in (slice(1), slice(1, 4))]
    average = torch.stack([half.masked.sum() for half in halves]).float().mean()
    together = sum(loss(half, lambda count: average) for half in halves) / 2
    assert together == pytest.approx(loss(rows, lambda count: count), rel=1e-5)
