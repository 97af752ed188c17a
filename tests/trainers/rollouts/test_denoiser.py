"""The block denoiser gives what the doubled sequence gives: losses, gradients, reveals and states."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.modeling import Readings, make_policy
from relay_hf.modeling.attention_blocks_relay import BLOCK_ATTENTION
from relay_hf.modeling.channel_relay import CHANNELS, LayerNormChannel
from relay_hf.trainers.model_preparation import KeepCaches, keep_caches_under_checkpointing
from relay_hf.trainers.objectives import RECIPES
from relay_hf.trainers.rollouts.denoiser import BlockDenoiser
from relay_hf.trainers.rollouts.noise import mask_uniformly
from relay_hf.trainers.rollouts.rollout import Rollout
from relay_hf.trainers.rollouts.rows import fresh_rows

from ..conftest import MASK, OBJECTIVES, VOCAB_SIZE, begin_rollout, build_model, build_rows, run_rollout
from .doubled import DoubledDenoiser


def run(
    model: Any, rows: Any, denoiser: type, objective: str, steps: int, threshold: float, window: int | None = None
) -> tuple[Rollout, dict]:
    """One rollout with either denoiser, and the gradients it leaves."""
    policy = make_policy("confidence_threshold", threshold)
    model.zero_grad()
    rollout = begin_rollout(model, rows, [policy] * steps, objective, window, make=denoiser)
    while rollout.windows_left:
        rollout.run_window().backward()
    return rollout, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_rollouts(model: Any, rows: Any, objective: str, *options: Any) -> None:
    expected, expected_gradients = run(model, rows, DoubledDenoiser, objective, *options)
    result, gradients = run(model, rows, BlockDenoiser, objective, *options)
    torch.testing.assert_close(result.step_losses, expected.step_losses, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(result.step_masked, expected.step_masked, strict=True))
    assert torch.equal(result.rows.masked, expected.rows.masked)
    if RECIPES[objective].carry != "nothing":
        text = rows.attention_mask[..., None]
        torch.testing.assert_close(result.rows.relay_state * text, expected.rows.relay_state * text, rtol=0, atol=1e-5)
    scale = max(float(g.norm()) for g in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        # Relative to the largest gradient: some are zero but for rounding (keys' biases cancel in the softmax).
        assert float((gradients[name] - gradient).norm()) <= 1e-5 * scale, name


def partly_denoised(model: Any, lengths: list[int], prompt: int, seed: int, fresh: bool) -> Any:
    """Rows of different lengths, in which some blocks may be known already."""
    batch = build_rows(len(lengths), max(lengths), prompt, seed)
    for row, length in enumerate(lengths):
        for name, filler in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
            batch[name][row, length:] = filler
    rows = fresh_rows(model.config, batch, keeps_state=True)
    if fresh:
        return rows
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(rows.relay_state.shape, generator=generator)
    rows = mask_uniformly(rows, model.config, [generator] * len(lengths))
    return replace(rows, relay_state=state, has_state=torch.ones_like(rows.has_state))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    block_size=st.sampled_from([1, 2, 4, 5]),
    lengths=st.lists(st.integers(4, 15), min_size=1, max_size=4),
    # At least one known token: positions of a first block of nothing but masks are equal, and so tie.
    prompt=st.integers(1, 3),
    steps=st.integers(1, 4),
    window=st.integers(1, 4),
    # `test_reference.py` has the one that supplies the state.
    objective=st.sampled_from(sorted({*OBJECTIVES} - {"residual_context"})),
    threshold=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    seed=st.integers(0, 1000),
    fresh=st.booleans(),
    scope=st.sampled_from(["masked", "all"]),
    shift=st.booleans(),
    read_out=st.sampled_from([("post_norm", -1), ("pre_norm", -1), ("pre_norm", 0)]),
    initial_state=st.sampled_from(["zeros", "none"]),
)
def test_block_denoiser_any_rollout_equals_the_doubled_sequence(
    block_size: int, lengths: list[int], prompt: int, steps: int, window: int, objective: str, threshold: float,
    seed: int, fresh: bool, scope: str, shift: bool, read_out: tuple[str, int], initial_state: str,
) -> None:  # fmt: skip
    model = build_model(
        seed=seed,
        block_size=block_size,
        token_shift=shift,
        relay_scope=scope,
        relay_readout=read_out[0],
        relay_layer=read_out[1],
        relay_initial_state=initial_state,
    )
    rows = partly_denoised(model, lengths, prompt, seed, fresh)
    assert_equal_rollouts(model, rows, objective, steps, threshold, window)


@pytest.mark.parametrize("implementation", [BLOCK_ATTENTION, "sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_block_denoiser_attention_and_checkpointing_give_the_same(implementation: str, checkpointing: bool) -> None:
    model = build_model().train()
    model.set_attn_implementation(implementation)
    rows = fresh_rows(model.config, build_rows(3), keeps_state=True)
    plain, plain_gradients = run(model, rows, BlockDenoiser, "relay", 3, 0.3)
    if checkpointing:
        model.gradient_checkpointing_enable()
        keep_caches_under_checkpointing(model)
    result, gradients = run(model, rows, BlockDenoiser, "relay", 3, 0.3)
    torch.testing.assert_close(result.step_losses, plain.step_losses)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("implementation", "is_square"), [(BLOCK_ATTENTION, False), ("sdpa", True)])
def test_block_denoiser_keeps_no_mask_of_all_queries_and_keys(implementation: str, is_square: bool) -> None:
    model, length, kept = build_model(), 128, []
    model.set_attn_implementation(implementation)
    rows = fresh_rows(model.config, build_rows(1, length=length), keeps_state=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        run_rollout(model, rows, [make_policy("confidence_threshold", 0.3)] * 2, "relay")
    assert (max(kept) >= length**2) == is_square


def test_block_denoiser_gpt2_checkpointing_changes_nothing() -> None:
    """GPT-2 drops caches before its layers see them, so that noisy blocks would be trained without the text before."""
    losses = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        text = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
        model = RelayForMaskedDiffusion(RelayConfig(text_config=text, block_size=4, mask_token_id=MASK)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            KeepCaches().on_train_begin(None, None, None, model=model)
        for dropout in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
            dropout.p = 0.0
        rows = fresh_rows(model.config, build_rows(2), keeps_state=True)
        result = run(model, rows, BlockDenoiser, "relay", 2, 0.3)[0]
        losses.append(torch.stack(result.step_losses))
    torch.testing.assert_close(*losses)


def test_block_denoiser_runs_only_active_blocks() -> None:
    model = build_model()
    rows = fresh_rows(model.config, build_rows(2, length=16, prompt=9), keeps_state=False)
    seen: list[Tensor] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    run_rollout(model, rows, [make_policy("confidence_threshold", 0.5)], "rollout")
    assert [embeds.shape[1] for embeds in seen] == [16, 8], "the clean text, then two blocks with masks"


def test_denoiser_construction_runs_no_model() -> None:
    model = build_model()
    rows = fresh_rows(model.config, build_rows(2), keeps_state=True)
    passes: list[None] = []
    model.register_forward_hook(lambda *_: passes.append(None))
    rollout = begin_rollout(model, rows, [make_policy("confidence_threshold", 0.5)], "relay")
    assert passes == []
    rollout.run_window()
    assert len(passes) == 2, "the clean text, then the step"


def test_block_denoiser_nothing_masked_has_zero_loss_and_gradient() -> None:
    model = build_model()
    rows = fresh_rows(model.config, build_rows(2), keeps_state=True)
    done = replace(rows, masked=torch.zeros_like(rows.masked))
    result, gradients = run(model, done, BlockDenoiser, "relay", 2, 0.5)
    assert [float(loss) for loss in result.step_losses] == [0.0, 0.0]
    assert all(not gradient.any() for gradient in gradients.values())


class Doubling(LayerNormChannel):
    def next_state(self, readings: Readings) -> Tensor:
        return 2 * readings.read_out


@pytest.mark.parametrize("clean_block_starts", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("block_size", [4, None])
def test_channel_decides_what_training_carries(
    monkeypatch: pytest.MonkeyPatch, block_size: int | None, shift: bool, clean_block_starts: bool
) -> None:
    states = []
    for channel in (LayerNormChannel, Doubling):
        monkeypatch.setitem(CHANNELS, "layer_norm", channel)
        model = build_model(block_size=block_size, token_shift=shift)
        rows = fresh_rows(model.config, build_rows(2), keeps_state=True)
        policies = [make_policy("confidence_threshold", 0.3)]
        rollout = begin_rollout(model, rows, policies, "relay", clean_block_starts=clean_block_starts)
        rollout.run_window()
        states.append(rollout.rows.relay_state)
    torch.testing.assert_close(states[1], 2 * states[0])
    assert states[0][:, 3:].any()
