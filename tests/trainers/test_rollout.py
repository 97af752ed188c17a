from typing import Any

import pytest
import torch

from relay_hf.modeling import make_policy
from relay_hf.trainers.buffer import fresh_rows
from relay_hf.trainers.rollout import RolloutResult, run_rollout

from .conftest import MASK, build_model, build_rows

WHOLE_SEQUENCE = {"block_size": None, "token_shift": False, "relay_scope": "all", "relay_readout": "pre_norm"}


def rollout(
    model: Any, carry: str = "relay", steps: int = 2, threshold: float = 0.2, **rows_options: Any
) -> RolloutResult:
    rows = fresh_rows(model.config, build_rows(3, **rows_options), carries_state=carry != "rollout")
    policy = make_policy("confidence_threshold", threshold)
    return run_rollout(model, model.config, rows, [policy] * steps, carry)


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
    rollout(model, carry).loss.backward()
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
        rollout(model, carry).loss.backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "relay" not in name])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_rollout_any_number_of_steps_sums_their_losses(steps: int) -> None:
    result = rollout(build_model(), steps=steps)
    assert len(result.step_losses) == len(result.step_reveals) == steps
    assert float(result.loss) == pytest.approx(sum(map(float, result.step_losses)))


def test_rollout_two_windows_equal_one_long_one_without_gradient() -> None:
    model = build_model().eval()
    policy = make_policy("confidence_threshold", 0.2)
    rows = fresh_rows(model.config, build_rows(3), carries_state=True)
    once = run_rollout(model, model.config, rows, [policy] * 4, "relay_sg")
    first = run_rollout(model, model.config, rows, [policy] * 2, "relay_sg")
    second = run_rollout(model, model.config, first.rows, [policy] * 2, "relay_sg")
    assert torch.equal(once.rows.noisy_ids, second.rows.noisy_ids)
    assert [float(x) for x in once.step_losses] == [float(x) for x in first.step_losses + second.step_losses]


def test_rollout_reveals_only_ground_truth_at_masked_positions() -> None:
    batch = build_rows(3)
    result = rollout(build_model(), steps=3)
    revealed = result.rows.noisy_ids != MASK
    assert torch.equal(result.rows.noisy_ids[revealed], batch["input_ids"][revealed])
    assert not any((reveal & ~result.rows.maskable).any() for reveal in result.step_reveals)
    assert not (result.step_reveals[0] & result.step_reveals[1]).any()


def test_rollout_every_unfinished_block_reveals_at_least_one() -> None:
    result = rollout(build_model(), steps=1, threshold=1.0)
    assert torch.equal(result.step_reveals[0].view(3, 3, 4).sum(-1), torch.ones(3, 3, dtype=torch.long))


def test_rollout_noisy_half_equals_decoding_the_block_behind_its_clean_prefix() -> None:
    """The doubled sequence is only a way to train all blocks at once: each sees what it sees in decoding."""
    from relay_hf import RelayCache

    model = build_model().eval()
    batch = build_rows(1)
    rows = fresh_rows(model.config, batch, carries_state=True)
    result = run_rollout(model, model.config, rows, [make_policy("confidence_threshold", 1.0)], "relay_sg")
    cache = RelayCache(config=model.config.text_config)
    model(batch["input_ids"][:, :8], past_key_values=cache)
    with cache.drafting():
        output = model(rows.noisy_ids[:, 8:], past_key_values=cache, relay_state=torch.zeros(1, 4, 16))
    # Position 0 of the block differs by design: training aligns it with the noisy block before.
    torch.testing.assert_close(result.rows.relay_state[:, 9:], output.relay_state[:, 1:], rtol=0, atol=1e-5)


def test_rollout_initial_state_none_feeds_nothing_to_fresh_rows() -> None:
    without, plain = build_model(relay_initial_state="none"), build_model()
    assert float(rollout(without, steps=1).loss) == pytest.approx(float(rollout(plain, "rollout", steps=1).loss))
    assert float(rollout(without, steps=1).loss) != pytest.approx(float(rollout(plain, steps=1).loss))


def test_rollout_right_padding_changes_nothing() -> None:
    model, batch = build_model(), build_rows(2, length=10)
    padded = {
        name: torch.nn.functional.pad(t, (0, 5), value=-100 if name == "labels" else 0) for name, t in batch.items()
    }
    policy = make_policy("confidence_threshold", 0.2)
    results = [
        run_rollout(model, model.config, fresh_rows(model.config, b, True), [policy] * 2, "relay")
        for b in (batch, padded)
    ]
    assert float(results[0].loss) == pytest.approx(float(results[1].loss), rel=1e-6)
    assert torch.equal(results[0].rows.noisy_ids, results[1].rows.noisy_ids[:, :10])


def test_rollout_eager_and_sdpa_attention_agree() -> None:
    model = build_model()
    expected = rollout(model).loss
    model.set_attn_implementation("eager")
    torch.testing.assert_close(rollout(model).loss, expected, rtol=1e-5, atol=1e-6)


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
