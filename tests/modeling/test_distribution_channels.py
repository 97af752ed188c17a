"""Channels that carry what was predicted: against NumPy, in decoding, and where they must change nothing."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.modeling import channel_relay
from relay_hf.modeling.prefix_relay import Prefix

from ..conftest import MASK, text_config
from .decoding import PAD, decode_alone, new_tokens_of, padded, prompts_of, run

CHANNELS = ("residual_context", "soft_mask")


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(40).reshape(2, 20).index_fill(1, torch.tensor([1, 3, 8, 9, 17]), MASK)


def angle_between(one: np.ndarray, other: np.ndarray) -> float:
    return math.acos(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def entropy(probabilities: np.ndarray) -> np.ndarray:
    return -(probabilities * np.log(probabilities)).sum(-1)


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("chunk", [1, 2**24])
def test_residual_context_equals_numpy(
    make_model: Callable,
    monkeypatch: pytest.MonkeyPatch,
    ids: Tensor,
    temperature: float,
    token_shift: bool,
    chunk: int,
) -> None:
    """Residual from the plain softmax, weight from the tempered one."""
    monkeypatch.setattr(channel_relay, "LOGITS_AT_ONCE", chunk)
    model = make_model(relay_channel="residual_context", relay_temperature=temperature, token_shift=token_shift)
    with torch.no_grad():
        first = model(ids)
        entered = model.relay(model.get_input_embeddings()(ids), ids == MASK, first.relay_state)
    logits, table = first.logits.double().numpy(), model.get_input_embeddings().weight.detach().double().numpy()
    weight = entropy(softmax(logits / temperature)) / math.log(64)
    expected = table[ids.numpy()]
    for row, column in (ids == MASK).nonzero().tolist():
        share = weight[row, column]
        expected[row, column] = (1 - share) * table[MASK] + share * softmax(logits)[row, column] @ table
    np.testing.assert_allclose(entered.double().numpy(), expected, atol=1e-6)
    assert first.relay_state.shape == (2, 20, 17)
    assert not first.relay_state[ids != MASK].any()


def enter_soft_masks(model: Any, ids: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings of a second step with weights 0.9, 2, -1.5, probabilities of the first, and the embedding table."""
    embed = model.get_input_embeddings()
    with torch.no_grad():
        model.relay.weight.copy_(torch.tensor([0.9, 2.0, -1.5]))
        first = model(ids)
        entered = model.relay(embed(ids), ids == MASK, first.relay_state)
    return entered.double().numpy(), softmax(first.logits.double().numpy()), embed.weight.detach().double().numpy()


@pytest.mark.parametrize("top_k", [1, 3, 64])
def test_soft_mask_equals_numpy(make_model: Callable, ids: Tensor, top_k: int) -> None:
    model = make_model(relay_channel="soft_mask", relay_top_k=top_k)
    entered, probabilities, table = enter_soft_masks(model, ids)
    expected = table[ids.numpy()]
    for row, column in (ids == MASK).nonzero().tolist():
        p = probabilities[row, column]
        best = np.argsort(-p)[:top_k]
        share = 0.9 / (1 + np.exp(-2.0 * (-entropy(p) + 1.5)))
        expected[row, column] = (1 - share) * table[MASK] + share * (p[best] / p[best].sum()) @ table[best]
    np.testing.assert_allclose(entered, expected, atol=1e-6)


def test_soft_mask_starts_as_its_authors_code(make_model: Callable, ids: Tensor) -> None:
    """Its scale at 0, so that a fresh channel changes nothing; slope and centre at 10 / 1.5 and -0.75."""
    model = make_model(relay_channel="soft_mask")
    assert model.relay.weight.tolist() == pytest.approx([0.0, 10 / 1.5, -0.75])
    with torch.no_grad():
        first = model(ids)
        assert torch.equal(model(ids, relay_state=first.relay_state).logits, first.logits)


def test_soft_mask_on_the_sphere_equals_numpy(make_model: Callable, ids: Tensor) -> None:
    """Directions turn by the angle's share, lengths change linearly, a mean is as long as what it is the mean of."""
    model = make_model(relay_channel="soft_mask", relay_top_k=3, relay_options={"mixing": "sphere"})
    entered, probabilities, table = enter_soft_masks(model, ids)
    lengths = np.linalg.norm(table, axis=1)
    for row, column in (ids == MASK).nonzero().tolist():
        p = probabilities[row, column]
        best = np.argsort(-p)[:3]
        best_p = p[best] / p[best].sum()
        share = 0.9 / (1 + np.exp(-2.0 * (-entropy(p) + 1.5)))
        got, mean = entered[row, column], best_p @ table[best]
        wanted = (1 - share) * lengths[MASK] + share * best_p @ lengths[best]
        np.testing.assert_allclose(np.linalg.norm(got), wanted, atol=1e-5)
        angles = [angle_between(got, end) for end in (table[MASK], mean)]
        between = angle_between(table[MASK], mean)
        np.testing.assert_allclose(angles, [share * between, (1 - share) * between], atol=1e-4)


def test_fresh_soft_mask_on_the_sphere_changes_nothing_and_learns(make_model: Callable, ids: Tensor) -> None:
    model = make_model(relay_channel="soft_mask", relay_options={"mixing": "sphere"})
    first = model(ids)
    second = model(ids, relay_state=first.relay_state, labels=ids.where(ids != MASK, 5))
    assert torch.equal(second.logits, first.logits)
    second.loss.backward()
    assert model.relay.weight.grad[0] != 0
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_residual_context_of_zero_state_changes_nothing(make_model: Callable, ids: Tensor) -> None:
    model = make_model(relay_channel="residual_context")
    state = model.initial_relay_state(*ids.shape)
    with torch.no_grad():
        assert torch.equal(model(ids, relay_state=state).logits, model(ids).logits)
        plain = make_model(relay_channel="none")
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("channel", CHANNELS)
def test_distribution_channel_state_is_never_differentiated(make_model: Callable, ids: Tensor, channel: str) -> None:
    assert not make_model(relay_channel=channel)(ids).relay_state.requires_grad


def test_soft_mask_weights_get_gradient(make_model: Callable, ids: Tensor) -> None:
    model = make_model(relay_channel="soft_mask")
    with torch.no_grad():
        model.relay.weight[0] = 0.5
    model(ids, relay_state=model(ids).relay_state, labels=ids.where(ids != MASK, 5)).loss.backward()
    assert model.relay.weight.grad.abs().min() > 0


@pytest.mark.parametrize("how", [{}, {"use_sub_block_cache": True}, {"fuse_commits": True}], ids=str)
@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("channel", CHANNELS)
def test_generate_distribution_channel_equals_plain_loop(
    make_model: Callable, channel: str, token_shift: bool, how: dict[str, Any]
) -> None:
    model, prompts = make_model(relay_channel=channel, token_shift=token_shift), prompts_of()
    if channel == "soft_mask":
        with torch.no_grad():  # a random model is too unsure for the published ones
            model.relay.weight.copy_(torch.tensor([0.9, 1.0, -3.0]))
    inputs, options = padded(prompts, "mixed"), {"sub_block_size": 4, **how}
    output = run(model, inputs, max_new_tokens=21, **options)
    expected = [decode_alone(model, p, 21, threshold=0.3, **options) for p in prompts]
    assert new_tokens_of(output, inputs["input_ids"].shape[1], PAD, None) == expected
    without = run(model, inputs, max_new_tokens=21, use_relay=False, **options)
    assert not torch.equal(output.sequences, without.sequences)


@pytest.mark.parametrize("channel", CHANNELS)
def test_distribution_channel_saved_and_loaded(make_model: Callable, ids: Tensor, tmp_path: Any, channel: str) -> None:
    model = make_model(relay_channel=channel, relay_temperature=0.7, relay_top_k=5)
    model.save_pretrained(tmp_path)
    loaded = RelayForMaskedDiffusion.from_pretrained(tmp_path)
    with torch.no_grad():
        state = model(ids).relay_state
        assert torch.equal(loaded(ids).relay_state, state)
        assert torch.equal(loaded(ids, relay_state=state).logits, model(ids, relay_state=state).logits)


def test_generate_without_relay_makes_no_state(make_model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(relay_channel="residual_context")
    monkeypatch.setattr(model.relay, "next_state", lambda readings: pytest.fail("a state was made for nobody"))
    run(model, prompts_of((9,))[0][None], max_new_tokens=12, use_relay=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"relay_channel": "residual_context", "relay_scope": "all"}, "`relay_scope='all'` has no meaning"),
        ({"relay_channel": "residual_context", "relay_temperature": 0.0}, "`relay_temperature=0.0` must be above 0"),
        ({"relay_channel": "soft_mask", "relay_options": {"mixing": "circle"}}, "give 'line' or 'sphere'"),
        ({"relay_channel": "soft_mask", "relay_top_k": 0}, "`relay_top_k=0` must be at least 1"),
    ],
)
def test_config_of_senseless_channel_raises(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelayConfig(text_config=text_config(), mask_token_id=MASK, **fields)


# -- the number of masks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("masks", [10, 13])
def test_state_with_known_number_of_masks_same_as_without(
    make_model: Callable, ids: Tensor, channel: str, masks: int
) -> None:
    """It may be too high, but here it is 10."""
    model = make_model(relay_channel=channel)
    with torch.no_grad():
        states = [model(ids, cache=Prefix([], 0, masks=known)).relay_state for known in (None, masks)]
    torch.testing.assert_close(states[1], states[0])


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize(
    ("block_size", "options"),
    [
        (8, {}),
        (8, {"fuse_commits": True}),
        (8, {"sub_block_size": 2, "use_sub_block_cache": True}),
        (8, {"sub_block_size": 4, "use_sub_block_cache": "prefix", "relay_start": "self"}),
        (None, {}),
        (None, {"sub_block_size": 4, "use_sub_block_cache": "prefix"}),
    ],
    ids=str,
)
def test_generate_knows_how_many_masks_each_forward_runs(
    make_model: Callable, block_size: int | None, options: dict[str, Any], token_shift: bool
) -> None:
    model, seen = make_model(relay_channel="residual_context", block_size=block_size, token_shift=token_shift), []

    def note(module: Any, arguments: tuple, kwargs: dict[str, Any]) -> None:
        if kwargs["output_relay_state"]:  # a commit makes no state
            seen.append((kwargs["cache"].masks, int((arguments[0] == MASK).sum())))

    model.register_forward_pre_hook(note, with_kwargs=True)
    run(model, padded(prompts_of(), "mixed"), max_new_tokens=21, eos_token_id=5, **options)
    assert len(seen) > 4
    assert not [(known, count) for known, count in seen if known != count]
