from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from relay_hf import RelayCache
from relay_hf.modeling import make_policy
from relay_hf.trainers.rollouts.rollout import Rollout
from relay_hf.trainers.rollouts.rows import fresh_rows

from ..conftest import MASK, begin_rollout, build_model, build_rows, run_rollout

WHOLE_SEQUENCE = {"block_size": None, "token_shift": False, "relay_scope": "all", "relay_readout": "pre_norm"}


def rollout(
    model: Any, carry: str = "relay", steps: int = 2, threshold: float = 0.2, **rows_options: Any
) -> tuple[torch.Tensor, Rollout]:
    rows = fresh_rows(model.config, build_rows(3, **rows_options), keeps_state=carry != "rollout")
    policy = make_policy("confidence_threshold", threshold)
    return run_rollout(model, rows, [policy] * steps, carry)


def states_fed(carry: str, **overrides: Any) -> list[torch.Tensor]:
    """The states that the channel was given, one a step, after the backward pass."""
    model = build_model(**overrides)
    fed: list[torch.Tensor] = []
    forward = model.relay.forward

    def record(embeds: torch.Tensor, receives: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        if state.requires_grad:
            state.retain_grad()
        fed.append(state)
        return forward(embeds, receives, state)

    model.relay.forward = record
    rollout(model, carry)[0].backward()
    return fed


@pytest.mark.parametrize("overrides", [{}, WHOLE_SEQUENCE])
def test_gradient_through_state_relay_is_nonzero(overrides: dict) -> None:
    first, second = states_fed("relay", **overrides)
    assert not first.requires_grad, "the buffer's state is detached"
    assert second.grad.abs().sum() > 0


@pytest.mark.parametrize("overrides", [{}, WHOLE_SEQUENCE])
def test_gradient_through_state_relay_sg_is_cut(overrides: dict) -> None:
    fed = states_fed("relay_sg", **overrides)
    assert len(fed) == 2
    assert not any(state.requires_grad for state in fed)
    assert fed[1].abs().sum() > 0


@pytest.mark.parametrize("overrides", [{}, WHOLE_SEQUENCE])
def test_state_rollout_is_absent(overrides: dict) -> None:
    assert states_fed("rollout", **overrides) == []


def test_relay_and_relay_sg_closed_channel_have_equal_gradients() -> None:
    gradients = []
    for carry in ("relay", "relay_sg"):
        model = build_model(channel_scale=0.0)
        rollout(model, carry)[0].backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "relay" not in name])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_rollout_any_number_of_steps_sums_their_losses(steps: int) -> None:
    loss, result = rollout(build_model(), steps=steps)
    assert len(result.step_losses) == len(result.step_masked) == steps
    assert loss.item() == pytest.approx(sum(map(float, result.step_losses)))


def test_rollout_two_windows_equal_one_long_one_without_gradient() -> None:
    model = build_model().eval()
    policy = make_policy("confidence_threshold", 0.2)
    rows = fresh_rows(model.config, build_rows(3), keeps_state=True)
    _, once = run_rollout(model, rows, [policy] * 4, "relay_sg")
    _, first = run_rollout(model, rows, [policy] * 2, "relay_sg")
    _, second = run_rollout(model, first.rows, [policy] * 2, "relay_sg")
    assert torch.equal(once.rows.masked, second.rows.masked)
    assert [float(x) for x in once.step_losses] == [float(x) for x in first.step_losses + second.step_losses]


def test_rollout_reveals_only_ground_truth_at_masked_positions() -> None:
    batch = build_rows(3)
    _, result = rollout(build_model(), steps=3)
    noisy_ids = result.rows.noisy_ids(MASK)
    revealed = noisy_ids != MASK
    assert torch.equal(noisy_ids[revealed], batch["input_ids"][revealed])
    steps = [*result.step_masked, result.rows.masked]
    assert torch.equal(steps[0], batch["labels"] != -100)
    assert all((after < before).any() and not (after > before).any() for before, after in pairwise(steps))


def test_rollout_every_unfinished_block_reveals_at_least_one() -> None:
    _, result = rollout(build_model(), steps=1, threshold=1.0)
    revealed = result.step_masked[0] & ~result.rows.masked
    assert torch.equal(revealed.view(3, 3, 4).sum(-1), torch.ones(3, 3, dtype=torch.long))


@pytest.mark.parametrize("clean_block_starts", [False, True])
@pytest.mark.parametrize("read_out", [{}, {"relay_readout": "pre_norm"}], ids=["post_norm", "pre_norm"])
def test_rollout_equals_decoding_the_block_behind_its_clean_prefix(clean_block_starts: bool, read_out: dict) -> None:
    """Training all blocks at once is only a shortcut: each sees what it sees in decoding."""
    model = build_model(**read_out).eval()
    batch = build_rows(1)
    rows = fresh_rows(model.config, batch, keeps_state=True)
    result = begin_rollout(
        model, rows, [make_policy("confidence_threshold", 1.0)], "relay_sg", clean_block_starts=clean_block_starts
    )
    losses: list[torch.Tensor] = []
    result.reduce_loss = lambda step, rows: losses.append(step) or step.sum()
    result.run_window()
    cache = RelayCache(config=model.config.text_config)
    model(batch["input_ids"][:, :8], cache=cache)
    output = model(rows.noisy_ids(MASK)[:, 8:], cache=cache.prefix(), relay_state=torch.zeros(1, 4, 16))
    # Published training aligns position 0 of the block with the noisy block before; decoding has only clean text there.
    first = 0 if clean_block_starts else 1
    torch.testing.assert_close(
        result.rows.relay_state[:, 8 + first :], output.relay_state[:, first:], rtol=0, atol=1e-5
    )
    expected = torch.nn.functional.cross_entropy(output.logits[0], batch["input_ids"][0, 8:], reduction="none")
    torch.testing.assert_close(losses[0][0, -4 + first :], expected[first:], rtol=0, atol=1e-5)
    assert clean_block_starts or not torch.isclose(losses[0][0, -4], expected[0], atol=1e-3)


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("channel", ["residual_context", "soft_mask"])
def test_rollout_of_distribution_channel_equals_decoding_the_block(channel: str, token_shift: bool) -> None:
    """Two steps; of the second, whose state the first has left, the losses."""
    model, batch = build_model(relay_channel=channel, token_shift=token_shift).eval(), build_rows(1)
    if channel == "soft_mask":
        with torch.no_grad():  # a random model is too unsure for the published ones
            model.relay.weight.copy_(torch.tensor([0.9, 1.0, -3.0]))
    rows = fresh_rows(model.config, batch, keeps_state=True)
    policies = [make_policy("confidence_threshold", 1.0)] * 2
    result = begin_rollout(model, rows, policies, "relay_sg", clean_block_starts=True)
    losses: list[torch.Tensor] = []
    result.reduce_loss = lambda step, rows: losses.append(step) or step.sum()
    result.run_window()
    last = batch["input_ids"][:, 8:].masked_fill(result.step_masked[1][:, 8:], MASK)
    cache = RelayCache(config=model.config.text_config)
    model(batch["input_ids"][:, :8], cache=cache)
    with torch.no_grad():
        first = model(torch.full_like(last, MASK), cache=cache.prefix())
        second = model(last, cache=cache.prefix(), relay_state=first.relay_state)
        without = model(last, cache=cache.prefix())
    masked = last[0] == MASK
    expected, otherwise = (
        torch.nn.functional.cross_entropy(output.logits[0], batch["input_ids"][0, 8:], reduction="none")[masked]
        for output in (second, without)
    )
    torch.testing.assert_close(losses[1][0, 8:][masked], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.rows.relay_state[:, 8:], second.relay_state, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, otherwise, atol=1e-3)


def test_rollout_initial_state_none_feeds_nothing_to_fresh_rows() -> None:
    without, plain = build_model(relay_initial_state="none"), build_model()
    assert rollout(without, steps=1)[0].item() == pytest.approx(rollout(plain, "rollout", steps=1)[0].item())
    assert rollout(without, steps=1)[0].item() != pytest.approx(rollout(plain, steps=1)[0].item())


def test_rollout_right_padding_changes_nothing() -> None:
    model, batch = build_model(), build_rows(2, length=10)
    padded = {
        name: torch.nn.functional.pad(t, (0, 5), value=-100 if name == "labels" else 0) for name, t in batch.items()
    }
    policy = make_policy("confidence_threshold", 0.2)
    results = [run_rollout(model, fresh_rows(model.config, b, True), [policy] * 2, "relay") for b in (batch, padded)]
    (loss, rollout_), (padded_loss, padded_rollout) = results
    assert loss.item() == pytest.approx(padded_loss.item(), rel=1e-6)
    assert torch.equal(rollout_.rows.masked, padded_rollout.rows.masked[:, :12])


def test_rollout_eager_and_sdpa_attention_agree() -> None:
    model = build_model()
    expected, _ = rollout(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(rollout(model)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("carry", ["relay", "rollout"])
def test_rollout_under_autocast_agrees_in_every_step_that_hides_the_same_positions(carry: str) -> None:
    """Losses of later steps differ more in training, but only because rounding reveals other positions."""
    model = build_model()
    rows = fresh_rows(model.config, build_rows(8), keeps_state=carry == "relay")
    policy = make_policy("confidence_threshold", 0.9)
    precise = run_rollout(model, rows, [policy] * 3, carry)[1]
    hidden = iter([*precise.step_masked[1:], precise.rows.masked])
    rounded = begin_rollout(model, rows, [policy] * 3, carry)
    rounded.advances = [lambda rows, confidence: replace(rows, masked=next(hidden))] * 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded.run_window()
    ours, theirs = (list(map(float, run.step_losses)) for run in (rounded, precise))
    assert ours == pytest.approx(theirs, rel=2e-3)
    assert ours != theirs, "autocast was off"
    if carry == "relay":
        # What is carried was not rounded.
        state = rounded.rows.relay_state
        assert not torch.equal(state, state.bfloat16().float())


def test_fresh_rows_all_labels_ignored_raises() -> None:
    batch = build_rows(2)
    with pytest.raises(ValueError, match="All labels of the batch are -100"):
        fresh_rows(build_model().config, {**batch, "labels": torch.full_like(batch["labels"], -100)}, True)


def test_fresh_rows_left_padding_raises() -> None:
    batch = build_rows(2)
    batch["attention_mask"][0, 0] = 0
    with pytest.raises(ValueError, match="padded on the left"):
        fresh_rows(build_model().config, batch, True)


def test_fresh_rows_without_labels_raises() -> None:
    with pytest.raises(ValueError, match="no `labels`"):
        fresh_rows(build_model().config, {"input_ids": torch.ones(1, 4, dtype=torch.long)}, True)


def test_fresh_rows_fill_the_last_block_with_visible_masks_that_nobody_learns() -> None:
    """As in decoding, where the number of [MASK]s in a block says nothing of the length of the text."""
    batch = build_rows(2, length=10)
    batch["attention_mask"][1, 7:], batch["labels"][1, 7:] = 0, -100
    rows = fresh_rows(build_model().config, batch, keeps_state=False)
    assert rows.attention_mask.sum(-1).tolist() == [12, 8]
    assert rows.clean_ids[0, 10:].tolist() == [MASK] * 2
    assert rows.clean_ids[1, 7].item() == MASK
    assert not rows.learned[0, 10:].any()
    assert not rows.learned[1, 7:].any()
    whole = fresh_rows(build_model(block_size=None).config, batch, keeps_state=False)
    assert torch.equal(whole.attention_mask, batch["attention_mask"].bool())
    assert torch.equal(whole.clean_ids, batch["input_ids"] * batch["attention_mask"])
