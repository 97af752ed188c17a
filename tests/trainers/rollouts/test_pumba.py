"""PUMBA's trajectory, loss and mean (arXiv 2609.37974) against a plain statement of them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from relay_hf import RelayForMaskedDiffusion
from relay_hf.modeling import make_policy
from relay_hf.trainers import RelayTrainer
from relay_hf.trainers.objectives import capped_mean
from relay_hf.trainers.rollouts.denoiser import StepResult, make_denoiser, receives_state
from relay_hf.trainers.rollouts.rollout import Reveal, Rollout
from relay_hf.trainers.rollouts.rows import RolloutRows, fresh_rows

from ..conftest import build_dataset, build_model, build_rows
from .doubled import DoubledDenoiser

CAP, Z_LOSS = 1.5, 0.1  # so small and so large that they matter for tiny rows


class PlainBlocks(DoubledDenoiser):
    """The doubled sequence, with a z-loss."""

    def _score(self, logits: Tensor, rows: RolloutRows) -> tuple[Tensor, Tensor]:
        losses, confidence = super()._score(logits, rows)
        return losses + Z_LOSS * logits.logsumexp(-1) ** 2, confidence


class PlainCanvas:
    """A pass over whole rows, with all logits."""

    def __init__(self, model: RelayForMaskedDiffusion) -> None:
        self.model, self.config = model, model.config

    def step(self, rows: RolloutRows, state: Tensor | None, leaves_state: bool) -> StepResult:
        ids, receives = rows.noisy_ids(self.config.mask_token_id), receives_state(self.config, rows)
        output = self.model(ids, attention_mask=rows.attention_mask, relay_state=state, relay_mask=receives)
        losses = F.cross_entropy(output.logits.transpose(1, 2), rows.clean_ids, reduction="none")
        losses = losses + Z_LOSS * output.logits.logsumexp(-1) ** 2
        probability = output.logits.detach().softmax(-1)
        probability[..., self.config.mask_token_id] = 0.0
        return StepResult(losses, probability.amax(-1), output.relay_state)


def groups_of(rows: RolloutRows, size: int | None) -> Iterator[tuple[int, slice]]:
    """Row and columns of each block, or of each row."""
    length = rows.masked.shape[1]
    for row in range(len(rows)):
        for begin in range(0, length, size or length):
            yield row, slice(begin, begin + (size or length))


def plain_loss(losses: Tensor, rows: RolloutRows, size: int | None) -> Tensor:
    total, count = losses.new_zeros(()), 0
    for row, columns in groups_of(rows, size):
        masked, learned = rows.masked[row, columns], int(rows.learned[row, columns].sum())
        if masked.any():
            weight = min(learned / int(masked.sum()), CAP)
            total, count = total + weight * losses[row, columns][masked].sum(), count + learned
    return total / count if count else total


def plain_reveal(confidence: Tensor, rows: RolloutRows, size: int | None, surest: int, threshold: float) -> Tensor:
    masked = rows.masked.clone()
    for row, columns in groups_of(rows, size):
        places = [p for p in range(columns.start, min(columns.stop, masked.shape[1])) if rows.masked[row, p]]
        places.sort(key=lambda p: -float(confidence[row, p]))
        for rank, place in enumerate(places):
            masked[row, place] = rank >= surest and not confidence[row, place] > threshold
    return masked


def plain_rollout(denoiser: Any, rows: RolloutRows, steps: int, surest: int, threshold: float) -> tuple[Tensor, Tensor]:
    """The mean loss of the steps, and the masks that they leave."""
    state, total, size = rows.relay_state, torch.zeros(()), denoiser.config.block_size
    for _ in range(steps):
        losses, confidence, state = denoiser.step(rows, state, True)
        total = total + plain_loss(losses, rows, size)
        masked = plain_reveal(confidence, rows, size, surest, threshold)
        rows = replace(rows, masked=masked, has_state=torch.ones_like(rows.has_state))
    return total / steps, rows.masked


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    size=st.sampled_from([None, 1, 4, 5]),
    steps=st.integers(1, 8),
    surest=st.integers(1, 3),
    threshold=st.sampled_from([0.1, 0.3, 1.0]),
    shift=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pumba_any_rollout_equals_its_equations(
    size: int | None, steps: int, surest: int, threshold: float, shift: bool, seed: int
) -> None:
    model = build_model(seed=seed, block_size=size, token_shift=shift and size is not None)
    rows = fresh_rows(model.config, build_rows(3, seed=seed), keeps_state=True)
    plain = PlainCanvas(model) if size is None else PlainBlocks(model, model.config, rows)
    results: list[tuple[Tensor, Tensor]] = [plain_rollout(plain, rows, steps, surest, threshold)]
    reveal = Reveal(make_policy("confidence_threshold", threshold, unmasking_count=surest), size)
    denoiser = make_denoiser(model, model.config, rows, z_loss=Z_LOSS)
    mean = capped_mean(CAP, size, lambda count: count)
    rollout = Rollout(denoiser, rows, [reveal] * steps, "gradient", mean, averages=True)
    results.append((rollout.run_window(), rollout.rows.masked))
    (expected, expected_masks), (loss, masks) = results
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(masks, expected_masks)
    parameters = list(model.parameters())
    wanted, found = (torch.autograd.grad(r[0], parameters, allow_unused=True) for r in results)
    for gradient, like in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, like, rtol=1e-3, atol=2e-4)


def test_trainer_options_of_pumba_give_the_loss_of_its_equations(make_trainer: Callable[..., RelayTrainer]) -> None:
    model, data = build_model(), build_dataset().select(range(4))
    rows = fresh_rows(model.config, {name: torch.tensor(data[name]) for name in data.column_names}, keeps_state=True)
    expected, _ = plain_rollout(PlainBlocks(model, model.config, rows), rows, 4, 2, 0.3)
    trainer = make_trainer(
        model,
        data,
        max_steps=1,
        rollout_steps=4,
        unmasking_count=2,
        step_reduction="mean",
        loss_weight_cap=CAP,
        z_loss=Z_LOSS,
        staggered_start=False,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-3)


def test_reveal_canvas_sub_blocks_begin_where_the_response_does() -> None:
    """As decoding counts them: from the end of each row's prompt."""
    model = build_model(block_size=None, token_shift=False)
    rows = fresh_rows(model.config, build_rows(1, length=12, prompt=3), keeps_state=True)
    reveal = Reveal(make_policy("fixed_count", 8), None, sub_block_size=4)
    masked = reveal(rows, torch.rand(1, 12)).masked[0]
    assert masked.nonzero()[:, 0].tolist() == [7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_reduction": "max"}, "choose 'sum' or 'mean'"),
        ({"loss_weight_cap": 0.5}, "below 1"),
        ({"z_loss": -1.0}, "at least 0"),
        ({"unmasking_count": 0}, "at least 1"),
        ({"unmasking_count": 2, "unmasking_policy": "fixed_count", "unmasking_threshold": 1}, "has no effect with"),
    ],
)
def test_trainer_senseless_options_of_pumba_raise(
    make_trainer: Callable[..., RelayTrainer], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)
