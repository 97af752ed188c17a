"""RelayForMaskedDiffusion: losses, read-outs, precision, checkpointing, adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Trainer,
    TrainingArguments,
)

from relay_hf import RelayCache, RelayConfig, RelayForMaskedDiffusion, RelayOutput

from ..conftest import MASK, VOCAB_SIZE, text_config

READ_OUTS: list[dict[str, Any]] = [{}, {"relay_readout": "pre_norm"}, {"relay_readout": "pre_norm", "relay_layer": 0}]


@pytest.fixture
def ids() -> Tensor:
    """(2, 16) with masks in both blocks."""
    return torch.arange(32).reshape(2, 16).index_fill(1, torch.tensor([3, 4, 9, 14]), MASK)


@pytest.fixture
def labels(ids: Tensor) -> Tensor:
    return torch.where(ids == MASK, 7, -100)


@pytest.fixture
def state() -> Tensor:
    return torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))


# -- loss and head -----------------------------------------------------------------------------------------------------


def test_labels_loss_is_mean_cross_entropy_at_their_positions(
    make_model: Callable, ids: Tensor, labels: Tensor
) -> None:
    output = make_model(token_shift=True)(ids, labels=labels)
    expected = F.cross_entropy(output.logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("kind", ["last", "indices", "mask"])
def test_logits_to_keep_same_logits_and_loss_as_selecting(
    make_model: Callable, ids: Tensor, labels: Tensor, kind: str
) -> None:
    keep = {"last": 3, "indices": torch.tensor([4, 9]), "mask": ids == MASK}[kind]
    selected = {"last": (slice(None), slice(-3, None)), "indices": (slice(None), [4, 9]), "mask": ids == MASK}[kind]
    model = make_model(token_shift=True)
    full, output = model(ids).logits[selected], model(ids, labels=labels, logits_to_keep=keep)
    # Another shape of matrix product rounds differently.
    torch.testing.assert_close(output.logits, full, atol=1e-5, rtol=1e-5)
    kept = labels[selected]
    torch.testing.assert_close(output.loss, F.cross_entropy(full[kept != -100], kept[kept != -100]))


def test_logits_to_keep_nothing_gives_no_logits(make_model: Callable, ids: Tensor) -> None:
    assert make_model()(ids, logits_to_keep=torch.tensor([], dtype=torch.long)).logits.shape == (2, 0, VOCAB_SIZE)


def test_labels_all_ignored_raises(make_model: Callable, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="All labels are -100"):
        make_model()(ids, labels=torch.full_like(ids, -100))


def test_labels_all_ignored_among_kept_raises(make_model: Callable, ids: Tensor, labels: Tensor) -> None:
    """Otherwise the loss would be NaN."""
    with pytest.raises(ValueError, match="All labels are -100"):
        make_model()(ids, labels=labels, logits_to_keep=1)


def test_labels_of_wrong_shape_raises(make_model: Callable, ids: Tensor, labels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"`labels` have shape \(1, 16\), but `input_ids` \(2, 16\)"):
        make_model()(ids, labels=labels[:1])


# -- inputs ------------------------------------------------------------------------------------------------------------


def test_position_ids_given_explicitly_same_as_default(make_model: Callable, ids: Tensor) -> None:
    model, mask = make_model(token_shift=True), torch.tensor([[1] * 16, [0] * 5 + [1] * 11])
    positions = torch.stack([torch.arange(16), (torch.arange(16) - 5).clamp(min=0)])
    assert torch.equal(model(ids, position_ids=torch.arange(16)[None]).logits, model(ids).logits)
    explicit = model(ids, attention_mask=mask, position_ids=positions)
    assert torch.equal(explicit.logits, model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("length", [15, 17])
def test_attention_mask_of_wrong_length_raises(make_model: Callable, ids: Tensor, length: int) -> None:
    with pytest.raises(ValueError, match=f"covers {length} positions, but there are 0 cached and 16 new ones"):
        make_model()(ids, attention_mask=torch.ones(2, length))


def test_attention_mask_without_cached_prefix_raises(make_model: Callable, ids: Tensor) -> None:
    """transformers would take the new positions for padding."""
    model = make_model()
    cache = model(ids[:, :8], use_cache=True).cache
    with pytest.raises(ValueError, match="covers 8 positions, but there are 8 cached and 8 new ones"):
        model(ids[:, 8:], attention_mask=torch.ones(2, 8), cache=cache)


def test_inputs_embeds_replace_the_lookup(make_model: Callable, ids: Tensor) -> None:
    model = make_model()
    plain = model(ids)
    again = model(ids, inputs_embeds=plain.inputs_embeds)
    assert torch.equal(again.logits, plain.logits)
    assert not torch.equal(model(ids, inputs_embeds=plain.inputs_embeds + 1).logits, plain.logits)


def test_inputs_embeds_without_tokens_raises(make_model: Callable) -> None:
    with pytest.raises(ValueError, match="`inputs_embeds` do not say which positions are masked"):
        make_model()(inputs_embeds=torch.zeros(2, 16, 16))


def test_model_without_mask_token_raises(tiny_text_config: Any) -> None:
    with pytest.raises(ValueError, match=r"`mask_token_id` is not set: let `relay_hf.convert\("):
        RelayForMaskedDiffusion(RelayConfig(text_config=tiny_text_config))


# -- outputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize(
    ("options", "read_by"),
    [
        ({}, lambda model: model.model.norm),
        ({"relay_readout": "pre_norm"}, lambda model: model.model.layers[1]),
        ({"relay_readout": "pre_norm", "relay_layer": 1}, lambda model: model.model.layers[1]),
        ({"relay_readout": "pre_norm", "relay_layer": -2}, lambda model: model.model.layers[0]),
    ],
)
def test_relay_state_is_output_of_named_layer(
    make_model: Callable, ids: Tensor, token_shift: bool, options: dict, read_by: Callable
) -> None:
    model, seen = make_model(token_shift=token_shift, **options), []
    read_by(model).register_forward_hook(lambda module, arguments, output: seen.append(output))
    ours = model(ids).relay_state
    raw = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.equal(ours, torch.cat([raw[:, :1], raw[:, :-1]], dim=1) if token_shift else raw)


@pytest.mark.parametrize(
    "options", [{}, {"relay_readout": "pre_norm"}, {"relay_readout": "pre_norm", "relay_layer": 0}]
)
@pytest.mark.parametrize("asked", [True, [0], [0, -1]])
def test_output_hidden_states_as_asked_and_state_the_same(
    make_model: Callable, ids: Tensor, options: dict, asked: Any
) -> None:
    model = make_model(**options)
    output = model(ids, output_hidden_states=asked)
    assert torch.equal(output.relay_state, model(ids).relay_state)
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
    assert model(ids).hidden_states is None


def test_output_hidden_states_from_config(make_model: Callable, ids: Tensor) -> None:
    model = make_model(relay_readout="pre_norm", relay_layer=0)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3
    assert model(ids, output_hidden_states=False).hidden_states is None


def test_forward_as_tuple_same_values(make_model: Callable, ids: Tensor) -> None:
    model = make_model()
    output, values = model(ids), model(ids, return_dict=False)
    assert isinstance(output, RelayOutput)
    assert isinstance(values, tuple)
    assert all(map(torch.equal, values, (output.logits, output.relay_state)))


def test_use_cache_same_logits_and_a_relay_cache(make_model: Callable, ids: Tensor) -> None:
    model = make_model(token_shift=True)
    output = model(ids, use_cache=True)
    assert isinstance(output.cache, RelayCache)
    assert output.cache.get_seq_length() == 16
    assert torch.equal(output.logits, model(ids).logits)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM])
def test_auto_class_from_config_gives_our_class(auto_class: Any, tiny_text_config: Any) -> None:
    config = RelayConfig(text_config=tiny_text_config, mask_token_id=MASK, relay_init="ones")
    model = auto_class.from_config(config)
    assert type(model) is RelayForMaskedDiffusion
    assert torch.equal(model.relay.norm.weight, torch.ones(16))


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_row_of_padding_only_leaves_no_nan(make_model: Callable, ids: Tensor, attention: str) -> None:
    model, mask = make_model(token_shift=True, open_channel=True), torch.tensor([[0] * 16, [0] * 13 + [1] * 3])
    model.set_attn_implementation(attention)
    output = model(ids, attention_mask=mask, relay_state=torch.ones(2, 16, 16), use_cache=True)
    assert output.logits.isfinite().all()
    assert all(layer.keys.isfinite().all() and layer.values.isfinite().all() for layer in output.cache.layers)
    output.logits[1].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_forward_close_to_full(
    make_model: Callable, ids: Tensor, state: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = make_model(open_channel=True)
    model.save_pretrained(tmp_path)
    low = RelayForMaskedDiffusion.from_pretrained(tmp_path, dtype=dtype)
    with torch.no_grad():
        full, ours = model(ids, relay_state=state), low(ids, relay_state=state, labels=ids)
    assert (ours.logits.dtype, ours.relay_state.dtype, ours.loss.dtype) == (dtype, dtype, torch.float32)
    # Eight bits of mantissa through two layers.
    error = (ours.logits.float() - full.logits).norm() / full.logits.norm()
    assert error < (0.05 if dtype is torch.bfloat16 else 0.01)


def test_model_from_low_precision_text_config_has_one_dtype(ids: Tensor) -> None:
    """Checkpoints note a dtype in their configuration; a model built from it is as wide as torch's default."""
    config = RelayConfig(text_config=text_config(dtype="bfloat16"), mask_token_id=MASK)
    model = RelayForMaskedDiffusion(config)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(ids).logits.dtype == torch.float32


@pytest.mark.parametrize(
    "options", [{}, {"relay_readout": "pre_norm"}, {"relay_readout": "pre_norm", "relay_layer": 0}]
)
def test_gradient_checkpointing_same_gradients(
    make_model: Callable, ids: Tensor, labels: Tensor, options: dict
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_model(open_channel=True, **options).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        first = model(ids, relay_state=torch.zeros(2, 16, 16), labels=labels)
        second = model(ids, relay_state=first.relay_state, labels=labels)
        (first.loss + second.loss).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())


def test_gradient_checkpointing_with_cache_in_training_raises(make_model: Callable, ids: Tensor) -> None:
    model = make_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"Gradient checkpointing drops keys and values.*`model.eval\(\)`"):
        model(ids, cache=RelayCache())


def test_resize_token_embeddings_keeps_old_logits(make_model: Callable, ids: Tensor) -> None:
    model = make_model()
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB_SIZE + 6)
    after = model(ids).logits
    assert after.shape[-1] == model.config.text_config.vocab_size == VOCAB_SIZE + 6
    torch.testing.assert_close(after[..., :VOCAB_SIZE], before, atol=1e-5, rtol=1e-5)
    scored = model(ids, targets=ids)
    torch.testing.assert_close(
        scored.token_losses, F.cross_entropy(after.flatten(0, 1), ids.flatten(), reduction="none")
    )
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("checkpointing", [False, True])
def test_plain_trainer_accumulated_batches_same_step_as_one(
    make_model: Callable, ids: Tensor, tmp_path: Path, checkpointing: bool
) -> None:
    rows, weights = [{"input_ids": row, "labels": row} for row in (*ids, *ids.flip(0))], []
    for size in (4, 1):
        options = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": 4 // size,
            "max_steps": 1,
            "max_grad_norm": 0,
        }
        options |= {"learning_rate": 1e-2, "optim": "sgd", "gradient_checkpointing": checkpointing, "report_to": []}
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, **options)
        model = make_model(open_channel=True)
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append(model.lm_head.weight.detach().clone())
    # Sums of gradients in another order; a loss that is not divided would differ by a factor.
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_lora_saved_reloaded_merged_same_logits(
    make_model: Callable, ids: Tensor, state: Tensor, tmp_path: Path, task_type: str | None
) -> None:
    lora = LoraConfig(target_modules="all-linear", modules_to_save=["relay"], task_type=task_type, r=4)
    trained = get_peft_model(make_model(), lora)
    trained.train()
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        trained(input_ids=ids, relay_state=state, labels=ids.clamp(max=9)).loss.backward()
        optimizer.step()
    expected = trained.eval()(input_ids=ids, relay_state=state).logits
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    merged = PeftModel.from_pretrained(make_model(), tmp_path).merge_and_unload()
    assert (expected - make_model()(ids, relay_state=state).logits).abs().max() > 0.1
    assert torch.equal(loaded(input_ids=ids, relay_state=state).logits, expected)
    assert merged.relay.norm.weight.abs().max() > 0  # the channel was trained in full and came along
    # Sums of products in another order.
    torch.testing.assert_close(merged(ids, relay_state=state).logits, expected, atol=1e-4, rtol=1e-4)


def test_lora_channel_parameters_stay_in_float32(make_model: Callable, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    base = RelayForMaskedDiffusion.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", modules_to_save=["relay"]))
    trained = {name: p.dtype for name, p in model.named_parameters() if "relay" in name and p.requires_grad}
    assert len(trained) == 2
    assert set(trained.values()) == {torch.float32}
