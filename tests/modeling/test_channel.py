"""The relay channel: a fresh one changes nothing, an open one changes what its options say, and in fp32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig

from relay_hf import RelayConfig, RelayForMaskedDiffusion

from ..conftest import MASK, text_config
from ..extensions import channel  # noqa: F401  (registers "bounded")


@pytest.fixture
def ids() -> Tensor:
    """(2, 20): the last two blocks of eight hold [MASK]s."""
    ids = torch.arange(2 * 20).reshape(2, 20) * 7 % MASK
    return ids.index_fill(1, torch.tensor([8, 9, 11, 17, 19]), MASK)


@pytest.fixture
def state() -> Tensor:
    return torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(1))


def block_causal_pattern(length: int, block_size: int) -> Tensor:
    """(1, 1, L, L) bool, written as the definition says it."""
    block = [i // block_size for i in range(length)]
    return torch.tensor([[[[block[k] <= block[q] for k in range(length)] for q in range(length)]]])


# -- a fresh channel -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["masked", "all"])
def test_zero_init_channel_any_state_equals_backbone_bit_by_bit(
    make_model: Callable, ids: Tensor, state: Tensor, scope: str
) -> None:
    model = make_model(relay_scope=scope, token_shift=False)
    pattern = {"attention_mask": block_causal_pattern(20, 8), "is_causal": False}
    with torch.no_grad():
        plain = model.lm_head(model.model(input_ids=ids, **pattern).last_hidden_state)
        for any_state in (None, torch.zeros_like(state), state, 1e4 * state):
            assert torch.equal(model(ids, relay_state=any_state).logits, plain)


def test_zero_init_channel_still_has_gradient(make_model: Callable, ids: Tensor, state: Tensor) -> None:
    """An exact no-op must not be a dead one."""
    model = make_model()
    model(ids, relay_state=state, labels=ids).loss.backward()
    assert model.relay.norm.weight.grad.abs().max() > 0
    assert model.relay.norm.bias.grad.abs().max() > 0


def test_gradient_flows_through_state_of_open_channel(make_model: Callable, ids: Tensor) -> None:
    model = make_model(open_channel=True)
    first = model(ids).relay_state.detach().requires_grad_()
    model(ids, relay_state=first, labels=ids).loss.backward()
    assert (first.grad.abs().amax(-1) > 0).equal(ids == MASK)


@pytest.mark.parametrize(("relay_init", "weight"), [("zeros", 0.0), ("ones", 1.0)])
def test_channel_initial_parameters(make_model: Callable, relay_init: str, weight: float) -> None:
    norm = make_model(relay_init=relay_init).relay.norm
    assert torch.equal(norm.weight, torch.full((16,), weight))
    assert torch.equal(norm.bias, torch.zeros(16))


# -- an open channel -------------------------------------------------------------------------------------------------


def test_no_state_with_open_channel_equals_backbone_bit_by_bit(make_model: Callable, ids: Tensor) -> None:
    model = make_model(open_channel=True)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, make_model()(ids).logits)


def test_zero_state_adds_bias_at_masks(make_model: Callable, ids: Tensor, state: Tensor) -> None:
    relay = make_model(open_channel=True).relay
    embeds, is_mask = torch.randn(2, 20, 16), ids == MASK
    expected = embeds + is_mask[..., None] * relay.norm.bias
    assert torch.equal(relay(embeds, is_mask, torch.zeros_like(state)), expected)


@pytest.mark.parametrize("scope", ["masked", "all"])
def test_scope_decides_which_inputs_depend_on_state(
    make_model: Callable, ids: Tensor, state: Tensor, scope: str
) -> None:
    model = make_model(relay_scope=scope, open_channel=True)
    seen: list[Tensor] = []
    model.model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["inputs_embeds"]), with_kwargs=True)
    model(ids)
    model(ids, relay_state=state)
    expected = torch.ones_like(ids, dtype=torch.bool) if scope == "all" else ids == MASK
    assert (seen[0] != seen[1]).any(-1).equal(expected)


def test_relay_mask_replaces_scope(make_model: Callable, ids: Tensor, state: Tensor) -> None:
    masked, everywhere = make_model(open_channel=True), make_model(open_channel=True, relay_scope="all")
    with torch.no_grad():
        ours = everywhere(ids, relay_state=state, relay_mask=ids == MASK).logits
        assert torch.equal(ours, masked(ids, relay_state=state).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_channel_low_precision_input_computed_in_float32(make_model: Callable, dtype: torch.dtype) -> None:
    relay = make_model(open_channel=True).relay
    embeds, state = torch.randn(2, 5, 16, dtype=dtype), 100 * torch.randn(2, 5, 16, dtype=dtype)
    result = relay(embeds, torch.ones(2, 5, dtype=torch.bool), state)
    signal = F.layer_norm(state.float(), (16,), relay.norm.weight, relay.norm.bias, relay.norm.eps)
    assert result.dtype == dtype
    assert torch.equal(result, embeds + signal.to(dtype))


def test_channel_huge_half_precision_state_stays_finite(make_model: Callable) -> None:
    """In fp16 the variance of such a state overflows."""
    relay, state = make_model(open_channel=True).relay, torch.full((1, 1, 16), 6e4, dtype=torch.float16)
    state[..., ::2] *= -1
    assert relay(torch.zeros_like(state), torch.ones(1, 1, dtype=torch.bool), state).isfinite().all()


@pytest.mark.parametrize("first", ["zeros", "none"])
def test_initial_relay_state_follows_config(make_model: Callable, first: str) -> None:
    state = make_model(relay_initial_state=first).initial_relay_state(3, 5)
    assert state is None if first == "none" else torch.equal(state, torch.zeros(3, 5, 16))


def test_initial_state_zeros_and_none_differ_if_bias_is_not_zero(make_model: Callable, ids: Tensor) -> None:
    with torch.no_grad():
        logits = []
        for first in ("zeros", "none"):
            model = make_model(relay_initial_state=first, open_channel=True)
            logits.append(model(ids, relay_state=model.initial_relay_state(*ids.shape)).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-2


# -- every option has an effect --------------------------------------------------------------------------------------

BASE: dict[str, Any] = {
    "text_config": text_config(),
    "block_size": 8,
    "mask_token_id": MASK,
    "token_shift": False,
    "tie_word_embeddings": False,
    "relay_channel": "layer_norm",
    "relay_layer": -1,
    "relay_readout": "pre_norm",
    "relay_scope": "masked",
    "relay_init": "ones",
    "relay_initial_state": "zeros",
    "relay_norm_eps": 1e-5,
    "relay_temperature": 1.0,
    "relay_top_k": 3,
    "relay_options": None,
}
# They decide what `generate` does, not what a forward does; `tests/conversion/test_families.py` has them.
OF_GENERATE = {"generation_defaults"}
OTHER: dict[str, Any] = {
    "text_config": text_config(intermediate_size=24),
    "block_size": None,
    "mask_token_id": 0,
    "token_shift": True,
    "tie_word_embeddings": True,
    "relay_channel": "none",
    "relay_layer": 0,
    "relay_readout": "post_norm",
    "relay_scope": "all",
    "relay_init": "zeros",
    "relay_initial_state": "none",
    "relay_norm_eps": 0.9,
    "relay_temperature": 0.5,
    "relay_top_k": 1,
    "relay_options": {"softness": 0.3},
}


def two_steps(**fields: Any) -> Tensor:
    """Logits of the second denoising step of a seeded model whose channel has a bias."""
    torch.manual_seed(0)
    model = RelayForMaskedDiffusion(RelayConfig(**{**BASE, **fields})).eval()
    ids = torch.arange(2 * 20).reshape(2, 20).index_fill(1, torch.tensor([1, 9, 17]), MASK)
    with torch.no_grad():
        # With equal weights the final norm would only scale the state, which the channel's LayerNorm does not see.
        model.model.norm.weight.copy_(torch.linspace(0.2, 3.0, 16))
        if model.config.relay_channel == "layer_norm":
            model.relay.norm.bias.fill_(0.5)
        if model.config.relay_channel == "soft_mask":
            model.relay.weight[0] = 1.0  # a fresh channel changes nothing
        if model.config.relay_channel == "bounded":
            model.relay.weight.fill_(1.0)
        first = model(ids, relay_state=model.initial_relay_state(*ids.shape))
        return model(ids, relay_state=first.relay_state).logits


def test_config_fields_all_tested() -> None:
    inherited = PreTrainedConfig.__annotations__.keys() - {"tie_word_embeddings"}
    assert set(OTHER) == set(BASE) == RelayConfig.__annotations__.keys() - inherited - OF_GENERATE


# Fields that other channels read.
CHANNEL_OF = {"relay_temperature": "residual_context", "relay_top_k": "soft_mask", "relay_options": "bounded"}


@pytest.mark.parametrize("field", OTHER)
def test_config_field_changes_result(field: str) -> None:
    base = {"relay_channel": CHANNEL_OF.get(field, "layer_norm")}
    assert (two_steps(**{**base, field: OTHER[field]}) - two_steps(**base)).abs().max() > 1e-3


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 19, 16), (1, 20, 16), (2, 20, 15), (20, 16)])
def test_forward_state_of_wrong_shape_raises(make_model: Callable, ids: Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"`relay_state` has shape .* but embeddings of shape \(2, 20, 16\) need \(2, 20, 16\)"
    ):
        make_model()(ids, relay_state=torch.zeros(shape))


def test_forward_state_without_channel_raises(make_model: Callable, ids: Tensor, state: Tensor) -> None:
    with pytest.raises(ValueError, match="given to a model with `relay_channel='none'`"):
        make_model(relay_channel="none")(ids, relay_state=state)


def test_no_channel_carries_nothing(make_model: Callable, ids: Tensor) -> None:
    model = make_model(relay_channel="none")
    assert model(ids).relay_state is None
    assert model.initial_relay_state(2, 20) is None
    assert not list(model.relay.parameters())
