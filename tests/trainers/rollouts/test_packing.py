"""Texts that share rows give what each gives alone: losses of positions, gradients, reveals and states."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.modeling import make_policy
from relay_hf.modeling.attention_blocks_relay import BLOCK_ATTENTION
from relay_hf.trainers.objectives import RECIPES
from relay_hf.trainers.rollouts.batches import TextRow
from relay_hf.trainers.rollouts.denoiser import make_denoiser
from relay_hf.trainers.rollouts.packing import Layout, plan
from relay_hf.trainers.rollouts.rollout import Reveal, Rollout
from relay_hf.trainers.rollouts.rows import RolloutRows, all_masked

from ..conftest import MASK, OBJECTIVES, VOCAB_SIZE, build_model, build_model_for
from .doubled import DoubledDenoiser
from .test_denoiser import partly_denoised

CPU = torch.device("cpu")


class Outcome(NamedTuple):
    """Losses of positions and masks of each step, (K, B, L) each, what the last leaves, and gradients by name."""

    losses: Tensor
    masked: Tensor
    rows: RolloutRows
    gradients: dict[str, Tensor]


def outcome(
    model: Any,
    rows: RolloutRows,
    layout: Layout | None = None,
    objective: str = "relay",
    steps: int = 2,
    window: int | None = None,
    threshold: float = 0.3,
    make: Any = make_denoiser,
    **options: Any,
) -> Outcome:
    """One rollout whose loss is the sum over all positions, so that those of texts add up."""
    recipe, losses = RECIPES[objective], []
    advances = [Reveal(make_policy("confidence_threshold", threshold), model.config.block_size)] * steps
    if not recipe.uses_buffer:
        advances = recipe.advances(None, model.config, False)
    denoiser = make(model, model.config, rows, **options, **({} if layout is None else {"layout": layout}))
    model.zero_grad()
    rollout = Rollout(
        denoiser,
        rows,
        advances,
        recipe.carry,
        lambda of_positions, _: losses.append(of_positions) or losses[-1].sum(),
        window,
    )
    while rollout.windows_left:
        rollout.run_window().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Outcome(
        torch.stack(losses).detach(), torch.stack([*rollout.step_masked, rollout.rows.masked]), rollout.rows, gradients
    )


def lengths_of(rows: RolloutRows) -> list[int]:
    return rows.attention_mask.sum(-1).tolist()


def side_by_side(model: Any, rows: RolloutRows, width: int) -> Layout:
    return Layout(rows, width, model.config.block_size)


def alone(rows: RolloutRows) -> list[RolloutRows]:
    """Each text without the others, and without their padding."""
    return [
        rows.map(lambda tensor, row=row: tensor[row : row + 1]).fit(length)
        for row, length in enumerate(lengths_of(rows))
    ]


def assert_equal_alone(model: Any, rows: RolloutRows, width: int, of_norm: float = 1e-5, **options: Any) -> None:
    """`of_norm`: how far a gradient may be, of the norm of the greatest."""
    together = outcome(model, rows, side_by_side(model, rows, width), **options)
    total: dict[str, Tensor] = {}
    for row, text in enumerate(alone(rows)):
        single, length = outcome(model, text, **options), text.clean_ids.shape[1]
        torch.testing.assert_close(together.losses[:, row, :length], single.losses[:, 0], rtol=1e-5, atol=1e-6)
        assert torch.equal(together.masked[:, row, :length], single.masked[:, 0])
        if single.rows.relay_state is not None:
            states = together.rows.relay_state[row, :length], single.rows.relay_state[0]
            torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
        for name, gradient in single.gradients.items():
            total[name] = total.get(name, 0) + gradient
    scale = max(float(gradient.norm()) for gradient in total.values())
    for name, gradient in total.items():
        assert float((together.gradients[name] - gradient).norm()) <= of_norm * scale, name


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    block_size=st.sampled_from([None, 1, 2, 4, 5]),
    lengths=st.lists(st.integers(4, 15), min_size=1, max_size=4),
    width=st.integers(8, 40),
    prompt=st.integers(1, 3),
    steps=st.integers(1, 3),
    window=st.integers(1, 3),
    objective=st.sampled_from(sorted(OBJECTIVES)),
    threshold=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    seed=st.integers(0, 1000),
    fresh=st.booleans(),
    shift=st.booleans(),
    clean_block_starts=st.booleans(),
    attention=st.sampled_from([BLOCK_ATTENTION, "sdpa", "eager"]),
    scope=st.sampled_from(["masked", "all"]),
    read_out=st.sampled_from([("post_norm", -1), ("pre_norm", 0)]),
    initial_state=st.sampled_from(["zeros", "none"]),
)
def test_packing_any_rollout_equals_each_text_alone(
    block_size: int | None, lengths: list[int], width: int, prompt: int, steps: int, window: int, objective: str,
    threshold: float, seed: int, fresh: bool, shift: bool, clean_block_starts: bool, attention: str, scope: str,
    read_out: tuple[str, int], initial_state: str,
) -> None:  # fmt: skip
    model = build_model_for(
        objective,
        seed=seed,
        block_size=block_size,
        token_shift=shift,
        relay_scope=scope,
        relay_readout=read_out[0],
        relay_layer=read_out[1],
        relay_initial_state=initial_state,
    )
    # In double precision (states are kept in single) no rounding comes near to what a wrong position would change.
    model.double().set_attn_implementation(attention)
    rows = partly_denoised(model, lengths, prompt, seed, fresh)
    assert_equal_alone(
        model, rows, width, 1e-6, objective=objective, steps=steps, window=window, threshold=threshold,
        clean_block_starts=clean_block_starts,
    )  # fmt: skip


@pytest.mark.parametrize("channel", ["residual_context", "soft_mask"])
@pytest.mark.parametrize("block_size", [4, None])
def test_packing_carried_distributions_equal_each_text_alone(block_size: int | None, channel: str) -> None:
    start = "none" if channel == "soft_mask" else "zeros"
    model = build_model(block_size=block_size, relay_channel=channel, relay_initial_state=start)
    rows = partly_denoised(model, [9, 5, 14, 7, 4], 2, 0, fresh=True)
    assert_equal_alone(model, rows, 16, objective="relay_sg", steps=3)


def test_packing_a_block_beside_one_of_another_text_does_not_follow_it() -> None:
    """Positions 0 to 3 of one text, then 4 to 7 of another: their numbers alone look like one text."""
    model = build_model()
    rows = partly_denoised(model, [8, 8], 0, 0, fresh=True)
    masked = rows.masked.clone()
    masked[0, 4:] = masked[1, :4] = False
    assert_equal_alone(model, replace(rows, masked=masked), 16, steps=1)


def test_packing_equals_the_doubled_sequence() -> None:
    model = build_model()
    rows = partly_denoised(model, [9, 5, 14, 7], 2, 0, fresh=True)
    expected = outcome(model, rows, steps=3, make=DoubledDenoiser)
    result = outcome(model, rows, side_by_side(model, rows, 24), steps=3)
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [4, None])
def test_packing_a_row_for_each_text_changes_no_bit(block_size: int | None) -> None:
    model = build_model(block_size=block_size)
    rows = partly_denoised(model, [16, 16, 16], 2, 0, fresh=True)
    expected, result = outcome(model, rows), outcome(model, rows, side_by_side(model, rows, 16))
    assert torch.equal(result.losses, expected.losses)
    assert torch.equal(result.rows.relay_state, expected.rows.relay_state)


@pytest.mark.parametrize("attention", [BLOCK_ATTENTION, "sdpa"])
def test_packing_learned_positions_that_end_inside_a_block(attention: str) -> None:
    torch.manual_seed(0)
    text = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=14, initializer_range=0.5)
    model = RelayForMaskedDiffusion(RelayConfig(text_config=text, block_size=4, mask_token_id=MASK)).eval()
    model.set_attn_implementation(attention)
    assert_equal_alone(model, partly_denoised(model, [14, 9, 6, 13], 2, 0, fresh=True), 32)


def test_packing_runs_fewer_positions() -> None:
    model, seen = build_model(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    rows = partly_denoised(model, [16, 4, 4, 8], 1, 0, fresh=True)
    outcome(model, rows, side_by_side(model, rows, 16), steps=1)
    assert seen == [(2, 16), (2, 16)], "the clean text, then the step"


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=9), width=st.integers(1, 24))
def test_plan_texts_share_rows_and_no_column(lengths: list[int], width: int) -> None:
    places, taken = plan(lengths, width), set()
    for (row, column), length in zip(places, lengths, strict=True):
        positions = {(row, column + n) for n in range(length)}
        assert column + length <= width or (column == 0 and length > width)
        assert not positions & taken
        taken |= positions
    assert 1 + max(row for row, _ in places) <= len(lengths)


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), size=st.sampled_from([None, 1, 2, 4]))
def test_layout_splits_what_it_has_joined(lengths: list[int], size: int | None) -> None:
    texts = [TextRow(torch.ones(length, dtype=torch.long), torch.ones(length, dtype=torch.bool)) for length in lengths]
    rows = all_masked(build_model(block_size=size).config, texts, keeps_state=False, device=CPU)
    numbers = torch.randn(*rows.clean_ids.shape, 3) * rows.attention_mask[..., None]
    layout = Layout(rows, 12, size)
    assert torch.equal(layout.split(layout.join(numbers)), numbers)
    assert torch.equal(layout.join(torch.ones(len(lengths))).sum(), rows.attention_mask.sum().float())
