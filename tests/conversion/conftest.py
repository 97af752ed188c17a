"""Tiny random checkpoints with the names and fields of their family, each with the model of transformers it equals."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from relay_hf.testing import CHAT_TEMPLATE, byte_tokenizer

# The byte tokenizer has 256 bytes, [EOS] and [PAD]: ids from 258 on are unused.
VOCAB_SIZE, UNUSED = 264, 258
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.5,
}
QWEN_TAIL: dict[str, Any] = {
    **SHAPE,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "max_window_layers": 2,
    "rope_scaling": None,
    "sliding_window": None,
    "use_cache": False,
    "use_sliding_window": False,
    "transformers_version": "4.46.2",
}
LLADA_NAMES = {
    "model.embed_tokens.": "model.transformer.wte.",
    "model.norm.": "model.transformer.ln_f.",
    "lm_head.": "model.transformer.ff_out.",
    "model.layers.": "model.transformer.blocks.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".ff_norm.",
    ".self_attn.o_proj.": ".attn_out.",
    ".self_attn.": ".",
    ".mlp.gate_proj.": ".ff_proj.",
    ".mlp.up_proj.": ".up_proj.",
    ".mlp.down_proj.": ".ff_out.",
}


@dataclass
class Family:
    """What a checkpoint of a family says of itself, and what it means."""

    config: dict[str, Any]
    twin: nn.Module  # the model of transformers with the same weights
    renames: dict[str, str]  # our parameter names -> the family's
    block_size: int | None
    token_shift: bool

    def logits(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, V) under the family's attention pattern, position-aligned."""
        length = ids.shape[1]
        block = torch.arange(length) // (self.block_size or length)
        sees = (block[:, None] >= block[None, :]).expand(len(ids), 1, length, length)  # (B, 1, query, key)
        raw = self.twin(ids, attention_mask=sees).logits
        return torch.cat([raw[:, :1], raw[:, :-1]], dim=1) if self.token_shift else raw


def family(name: str, ties: bool = False) -> Family:
    """A seeded model of the family."""
    torch.manual_seed(0)
    tied = {"tie_word_embeddings": ties}
    if name == "qwen2":
        config = Qwen2Config(**SHAPE, **tied, bos_token_id=256, eos_token_id=256)
        fields = {**QWEN_TAIL, **tied, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
        return Family(fields, Qwen2ForCausalLM(config).eval(), {}, 32, True)
    if name == "fast_dllm":
        fields = {**QWEN_TAIL, **tied, "model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"]}
        fields |= {"bd_size": 8, "mask_token_id": 260, "auto_map": {"AutoModelForCausalLM": "modeling.X"}}
        return Family(fields, Qwen2ForCausalLM(Qwen2Config(**SHAPE, **tied)).eval(), {}, 8, True)
    if name == "sdar":
        fields = {**QWEN_TAIL, **tied, "model_type": "sdar", "architectures": ["SDARForCausalLM"], "head_dim": 8}
        fields |= {"attention_bias": False, "block_size": 4, "mask_token_id": 260}
        fields |= {"auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"}}
        return Family(fields, Qwen3ForCausalLM(Qwen3Config(**SHAPE, **tied, head_dim=8)).eval(), {}, 4, False)
    if name == "dream":
        fields = {**QWEN_TAIL, **tied, "model_type": "Dream", "architectures": ["DreamModel"], "use_mrope": False}
        fields |= {"mask_token_id": 260, "pad_token_id": 257, "auto_map": {"AutoModel": "modeling_dream.DreamModel"}}
        return Family(fields, Qwen2ForCausalLM(Qwen2Config(**SHAPE, **tied)).eval(), {}, None, True)
    assert name == "llada"
    shape = {**SHAPE, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
    renames = LLADA_NAMES
    return Family(
        {**LLADA_CONFIG, "weight_tying": ties},
        LlamaForCausalLM(LlamaConfig(**shape, **tied)).eval(),
        renames,
        None,
        False,
    )


LLADA_CONFIG: dict[str, Any] = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 16,
    "embedding_dropout": 0.0,
    "embedding_size": VOCAB_SIZE,
    "eos_token_id": 256,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 260,
    "max_sequence_length": 128,
    "mlp_hidden_size": 32,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "pad_token_id": 257,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "use_cache": False,
    # Fewer than rows of the embeddings, which the published file does not make use of.
    "vocab_size": 262,
}


def make_tokenizer(diffuses: bool = False) -> PreTrainedTokenizerFast:
    """Of diffusion families id 260 is a token, as with them not called the mask token."""
    tokenizer = byte_tokenizer(mask_token=None)
    if diffuses:
        tokenizer.add_tokens(["<|a|>", "<|b|>", "<|mdm_mask|>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_weights(folder: Path, weights: dict[str, Tensor], shards: int) -> None:
    """One file, or several with an index."""
    names = list(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    index: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in weights.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )


@pytest.fixture
def write_source(tmp_path: Path) -> Callable[..., tuple[Path, Family]]:
    """Writes a checkpoint of a family with its tokenizer; `None` as tokenizer leaves it out."""

    def write(
        name: str,
        *,
        ties: bool = False,
        shards: int = 1,
        dtype: torch.dtype = torch.float32,
        tokenizer: Any = "byte",
        extra_weights: dict[str, Tensor] | None = None,
        generation: dict[str, Any] | None = None,
        **fields: Any,
    ) -> tuple[Path, Family]:
        source = family(name, ties)
        source.twin.to(dtype)
        folder = tmp_path / "source"
        folder.mkdir()
        # A tied head is not in the file.
        weights = {n: p.clone() for n, p in source.twin.state_dict().items() if not (ties and n == "lm_head.weight")}
        for ours, theirs in source.renames.items():
            weights = {n.replace(ours, theirs, 1): p for n, p in weights.items()}
        write_weights(folder, {**weights, **(extra_weights or {})}, shards)
        saved_dtype = {"torch_dtype": str(dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps({**source.config, **saved_dtype, **fields}))
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        if tokenizer is not None:
            (make_tokenizer(name != "qwen2") if tokenizer == "byte" else tokenizer).save_pretrained(folder)
        return folder, source

    return write
