"""Weights behind adapters and hooks, and quantised ones: what reads them must say what calling their module says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from relay_hf import RelayForMaskedDiffusion
from relay_hf.modeling.head_relay import RelayHead, is_plain, score, token_table

from ..conftest import MASK

MakeModel = Callable[..., RelayForMaskedDiffusion]
IDS = torch.tensor([[5, 6, 7, 8, 9, MASK, MASK, MASK]])
ADAPTERS = {
    "lora": {"target_modules": ["embed_tokens", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, MASK]}},
    "tied_saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


def adapted(model: RelayForMaskedDiffusion, **options: Any) -> Any:
    """A PeftModel whose adapters say something."""
    wrapped = get_peft_model(model, LoraConfig(r=2, **options)).eval()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return wrapped


@pytest.mark.parametrize("channel", ["residual_context", "soft_mask"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_state_is_made_of_what_adapted_embeddings_look_up(
    make_model: MakeModel, channel: str, tied: bool, adapter: str
) -> None:
    if tied and adapter in ("lora", "saved", "dora"):
        pytest.skip("PEFT cannot merge these into tied weights")
    model = adapted(make_model(relay_channel=channel, tie_word_embeddings=tied), **ADAPTERS[adapter])
    with torch.no_grad():
        state = model(input_ids=IDS).relay_state
        merged = model.merge_and_unload().eval()(input_ids=IDS).relay_state
    torch.testing.assert_close(state, merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapted_head_scores_and_chooses_as_its_logits_say(make_model: MakeModel, adapter: str) -> None:
    tied = adapter.startswith("tied")
    model = adapted(make_model(tie_word_embeddings=tied), **ADAPTERS[adapter]).get_base_model()
    hidden, targets = torch.randn(300, 16, requires_grad=True), torch.randint(0, MASK, (300,))
    expected = score(RelayHead(16, 64, bias=False), hidden[:0], targets[:0], MASK)
    assert [len(part) for part in expected] == [0, 0]
    logits = model.lm_head(hidden)
    losses, confidence = score(model.lm_head, hidden, targets, MASK, z_loss=0.1)
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    expected_losses = nn.functional.cross_entropy(logits, targets, reduction="none") + 0.1 * logits.logsumexp(-1) ** 2
    torch.testing.assert_close(losses, expected_losses)
    (expected_gradient,) = torch.autograd.grad(expected_losses.sum(), hidden)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    probability = logits.softmax(-1)
    probability[:, MASK] = 0.0
    torch.testing.assert_close(confidence, probability.amax(-1).detach())
    best, token = model.best_tokens(hidden)
    torch.testing.assert_close(best, probability.amax(-1).detach(), check_device=False)
    assert torch.equal(token, probability.argmax(-1))


def test_hooks_and_replaced_forwards_are_seen(make_model: MakeModel) -> None:
    model = make_model(relay_channel="residual_context")
    embeddings, head = model.get_input_embeddings(), model.lm_head
    assert token_table(embeddings) is embeddings.weight
    assert is_plain(head, RelayHead)
    embeddings.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(token_table(embeddings), 2 * embeddings.weight)
    handle = head.register_forward_hook(lambda module, args, output: -output)
    hidden = torch.randn(4, 16)
    assert torch.equal(model.best_tokens(hidden)[1], (-hidden @ head.weight.T)[:, :MASK].argmax(-1))
    handle.remove()
    head.forward = lambda hidden: -nn.functional.linear(hidden, head.weight)
    assert torch.equal(model.best_tokens(hidden)[1], (-hidden @ head.weight.T)[:, :MASK].argmax(-1))


def quantise(model: nn.Module, bits: int) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig() if bits == 8 else torchao.IntxWeightOnlyConfig(torch.int4))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("channel", ["layer_norm", "residual_context"])
def test_model_quantised_in_place_writes_what_its_logits_say(make_model: MakeModel, bits: int, channel: str) -> None:
    model = make_model(relay_channel=channel, text={"hidden_size": 32, "intermediate_size": 32})
    quantise(model, bits)
    assert not is_plain(model.lm_head, RelayHead)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    assert all(type(weight) is not nn.Parameter for weight in weights)
    written = model.generate(IDS[:, :5], max_new_tokens=3, unmasking_policy="fixed_count", unmasking_threshold=3)
    # All at once, so that one forward says what is written.
    shown = torch.cat([IDS[:, :5], torch.full((1, 3), MASK)], dim=1)
    state = model.initial_relay_state(1, 8)
    logits: Tensor = model(shown, relay_state=state).logits[0, 5:, :MASK]
    assert written[0, 5:].tolist() == logits.argmax(-1).tolist()
