"""Backbones of other families: forward, training step, decoding, saving and LoRA; and which are refused, and why."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTJModel,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
)

from relay_hf import RelayConfig, RelayForMaskedDiffusion, RelayTrainer, RelayTrainerConfig
from relay_hf.testing import byte_tokenizer

from ..conftest import MASK, VOCAB_SIZE
from .decoding import PAD, decode_alone, new_tokens_of, padded, prompts_of, run

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 4}
OPT = {"word_embed_proj_dim": 16, "ffn_dim": 32}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 1.0}

BACKBONES = [
    Qwen2Config(**SIZES, num_key_value_heads=2),
    Qwen3Config(**SIZES, **GROUPED),
    LlamaConfig(**SIZES),
    MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None),
    GemmaConfig(**{**SIZES, "tie_word_embeddings": True}, **GROUPED),
    MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, **EXPERTS),
    Qwen3MoeConfig(**SIZES, **GROUPED, num_experts=4, moe_intermediate_size=8, **EXPERTS),
    # Learned positions; other names, and embeddings that are called something else, tied or not.
    GPT2Config(**{**SIZES, "tie_word_embeddings": True}),
    OPTConfig(**{**SIZES, "tie_word_embeddings": True}, **OPT),
    GPTNeoXConfig(**SIZES),
    PhiConfig(**SIZES),
    *([GPTJConfig(**SIZES, rotary_dim=4)] if GPTJModel._supports_attention_backend else []),  # since 5.24
    # Drops the argument that says "not causal".
    NemotronConfig(**SIZES, num_key_value_heads=2),
]
# OPT would count them from the attention mask.
POSITIONS = torch.arange(24)[None]
each_backbone = pytest.mark.parametrize("backbone", BACKBONES, ids=lambda config: config.model_type)


def build(backbone: PreTrainedConfig, **options: Any) -> RelayForMaskedDiffusion:
    torch.manual_seed(0)
    fields = {"block_size": 8, "mask_token_id": MASK, "token_shift": True, **options}
    return RelayForMaskedDiffusion(RelayConfig(text_config=copy.deepcopy(backbone), **fields)).eval()


@pytest.fixture
def ids() -> Tensor:
    """(2, 24) with masks in every block."""
    tokens = torch.randint(3, MASK, (2, 24), generator=torch.Generator().manual_seed(0))
    return tokens.index_fill(1, torch.tensor([3, 4, 9, 14, 20]), MASK)


@each_backbone
@pytest.mark.parametrize("channel", ["residual_context", "soft_mask"])
def test_sure_prediction_is_carried_as_the_embedding_of_its_token(backbone: PreTrainedConfig, channel: str) -> None:
    """Also where embeddings are scaled when they are looked up, as Gemma's are."""
    model = build(backbone, relay_channel=channel)
    tokens = torch.tensor([5, 0, 62])
    is_masked = torch.tensor([[True, False, True, True]])
    state = model.relay.state_of(
        1e4 * F.one_hot(tokens, VOCAB_SIZE).float(), is_masked, torch.nn.Identity(), model.get_input_embeddings()
    )
    torch.testing.assert_close(state[is_masked][:, :-1], model.get_input_embeddings()(tokens).detach())


@each_backbone
@pytest.mark.parametrize("block_size", [8, None])
@torch.no_grad()
def test_forward_same_as_backbone_under_prepared_mask(
    backbone: PreTrainedConfig, ids: Tensor, block_size: int | None
) -> None:
    model = build(backbone, block_size=block_size)
    block = torch.arange(24) // (block_size or 24)
    sees = (block[:, None] >= block[None, :]).expand(2, 1, 24, 24)  # (B, 1, query, key)
    hidden = model.model(input_ids=ids, attention_mask=sees, position_ids=POSITIONS).last_hidden_state
    expected = F.linear(torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1), model.lm_head.weight)
    # Without any mask, kernels may add in another order.
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


@each_backbone
@torch.no_grad()
def test_fresh_channel_and_no_channel_bit_equal_to_backbone(backbone: PreTrainedConfig, ids: Tensor) -> None:
    """The base model itself, of transformers, under the same attention pattern and with the same weights."""
    model, plain = build(backbone), build(backbone, relay_channel="none")
    for each in (model, plain):
        each.set_attn_implementation("sdpa")
    base = AutoModelForCausalLM.from_config(copy.deepcopy(backbone)).eval()
    base_model = getattr(base, base.base_model_prefix)
    base_model.load_state_dict(model.model.state_dict())
    base.get_output_embeddings().weight.copy_(model.lm_head.weight)
    block = torch.arange(24) // 8
    sees = (block[:, None] >= block[None, :]).expand(2, 1, 24, 24)
    hidden = base_model(input_ids=ids, attention_mask=sees, position_ids=POSITIONS).last_hidden_state
    # Not the base's own `forward`: with such a mask, it cannot count what its router does.
    raw = base.get_output_embeddings()(hidden)
    expected = torch.cat([raw[:, :1], raw[:, :-1]], dim=1)
    state = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plain(ids).logits, expected)
    assert torch.equal(model(ids, relay_state=state).logits, expected)
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_gemma_embeddings_scaled_once_on_either_path(ids: Tensor) -> None:
    model = build(GemmaConfig(**{**SIZES, "tie_word_embeddings": True}, **GROUPED))
    rows = model.get_input_embeddings().weight[ids]
    output = model(ids)
    # A square root of 16, times the row; the channel adds behind that.
    torch.testing.assert_close(output.inputs_embeds, 4.0 * rows)
    assert torch.equal(model(ids, inputs_embeds=output.inputs_embeds).logits, output.logits)
    sees = torch.ones(2, 1, 24, 24, dtype=torch.bool)
    through_ids = model.model(input_ids=ids, attention_mask=sees).last_hidden_state
    through_embeds = model.model(inputs_embeds=output.inputs_embeds, attention_mask=sees).last_hidden_state
    assert torch.equal(through_ids, through_embeds)


@each_backbone
@pytest.mark.parametrize("read_out", ["post_norm", "pre_norm"])
def test_decodes_as_plain_loop_and_reloads(backbone: PreTrainedConfig, read_out: str, tmp_path: Path) -> None:
    model = build(backbone, relay_init="ones", relay_readout=read_out)
    prompts = prompts_of((3, 13))
    output = run(model, padded(prompts, "left"), max_new_tokens=12)
    ours = new_tokens_of(output, 13, PAD, None)
    assert ours == [decode_alone(model, p, 12, threshold=0.3, sub_block_size=8) for p in prompts]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, padded(prompts, "left"), max_new_tokens=12).sequences, output.sequences)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == backbone.tie_word_embeddings


@each_backbone
def test_training_step_moves_backbone_and_channel(backbone: PreTrainedConfig, tmp_path: Path) -> None:
    rows = torch.randint(3, MASK, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "objective": "relay"}
    quiet = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    model = build(backbone)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = RelayTrainer(
        model,
        RelayTrainerConfig(str(tmp_path), **options, **quiet),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=byte_tokenizer(pad_token="!", eos_token='"', mask_token=None),
    )
    trainer.train()
    assert torch.tensor(trainer.state.log_history[0]["loss"]).isfinite()
    unmoved = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    # What the loss does not depend on: keys' biases shift all scores of a query alike.
    assert not [name for name in unmoved if "bias" not in name], unmoved
    assert "relay.norm.weight" not in unmoved


@each_backbone
def test_lora_trains_and_merges(backbone: PreTrainedConfig, ids: Tensor) -> None:
    state = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1))
    lora = LoraConfig(target_modules="all-linear", exclude_modules=["lm_head"], modules_to_save=["relay"], r=4)
    model = get_peft_model(build(backbone), lora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(input_ids=ids, relay_state=state, labels=ids.clamp(max=9)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        expected = model(input_ids=ids, relay_state=state).logits
        assert (expected - build(backbone)(ids, relay_state=state).logits).abs().max() > 1e-2
        # Sums of products in another order.
        torch.testing.assert_close(
            model.merge_and_unload()(ids, relay_state=state).logits, expected, atol=1e-3, rtol=1e-3
        )


def test_router_loss_is_not_added(ids: Tensor) -> None:
    """An expert model's own head would add the balance of its router to the loss."""
    output = build(BACKBONES[5])(ids, labels=ids)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), ids.flatten()))


@pytest.mark.parametrize("family", [MixtralConfig, Qwen3MoeConfig])
def test_expert_checkpoint_of_single_experts_loads(family: Any, ids: Tensor, tmp_path: Path) -> None:
    backbone = next(config for config in BACKBONES if type(config) is family)
    base = AutoModelForCausalLM.from_config(copy.deepcopy(backbone)).eval()
    base.save_pretrained(tmp_path)
    model = RelayForMaskedDiffusion.from_pretrained(tmp_path, mask_token_id=MASK, block_size=1)
    with torch.no_grad():
        # Blocks of one are causal.
        torch.testing.assert_close(model(ids).logits[:, 1:], base(ids).logits[:, :-1], atol=1e-4, rtol=1e-4)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "gap"),
    [
        (lambda: BartConfig(), "it is an encoder-decoder"),
        (lambda: LlavaConfig(), "describes several models"),
        (lambda: MambaConfig(**SIZES), r"layers of type \['linear_attention'\]"),
        (lambda: MistralConfig(**SIZES, sliding_window=8), r"layers of type \['sliding_attention'\]"),
        (lambda: Gemma2Config(**SIZES), r"layers of type \['sliding_attention'\].*; .*'final_logit_softcapping': 30"),
        (lambda: CohereConfig(**SIZES), r"head changes the logits by \{'logit_scale': 0.0625\}"),
    ],
)
def test_configuration_of_unsupported_backbone_raises(backbone: Callable[[], Any], gap: str) -> None:
    with pytest.raises(ValueError, match=rf"^The backbone `\w+` is not supported: .*{gap}"):
        RelayConfig(text_config=backbone())


@pytest.mark.parametrize(
    ("backbone", "gap"),
    [
        (FalconConfig(**SIZES), "attention does not use transformers' attention interface"),
        (StableLmConfig(**SIZES), "attention does not use transformers' attention interface"),
        (OPTConfig(**SIZES, word_embed_proj_dim=8, ffn_dim=32), "embeddings are 8 wide and its layers 16"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_building_unsupported_backbone_raises(backbone: Any, gap: str) -> None:
    with pytest.raises(ValueError, match=rf"^The backbone `\w+` is not supported: .*{gap}"):
        build(backbone)
