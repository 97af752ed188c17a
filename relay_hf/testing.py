"""Tiny random models and a tokenizer of bytes, for tests of code that uses relay_hf: no network, milliseconds.

tokenizer = byte_tokenizer()
model = tiny_model(tokenizer, open_channel=True)
"""

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from .modeling import RelayConfig, RelayForMaskedDiffusion

SPECIAL_TOKENS = {"eos_token": "[EOS]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
CHAT_TEMPLATE = """
{%- for message in messages %}{{ message.role + ": " + message.content + "\\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "assistant: " }}{% endif %}"""


def byte_tokenizer(*, chat_template: str | None = None, **special_tokens: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a byte, without merges: 256 tokens, and the special ones behind them.

    Args:
        chat_template: Jinja text, for instance `CHAT_TEMPLATE`.
        special_tokens: texts by their names. By default `eos_token` is [EOS], `pad_token` [PAD] and `mask_token`
            [MASK], with the ids 256 to 258; None leaves one out, and a byte (`pad_token="!"`) keeps its own id.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = {name: token for name, token in {**SPECIAL_TOKENS, **special_tokens}.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **named)


def all_tokens_but(tokenizer: PreTrainedTokenizerBase, letters: str) -> list[int]:
    """Ids for `suppress_tokens`: a model then writes nothing but the letters, and no stop token."""
    return sorted(set(range(len(tokenizer))) - set(tokenizer(letters)["input_ids"]))


def tiny_text_config(**fields: Any) -> Qwen2Config:
    """A Qwen2 of two layers of width 16 and 64 tokens, initialised so widely that its predictions differ."""
    defaults = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.5,
        "pad_token_id": 0,
    }
    return Qwen2Config(**{**defaults, **fields})


def tiny_model(
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    seed: int = 0,
    open_channel: bool = False,
    text: Mapping[str, Any] | None = None,
    **relay: Any,
) -> RelayForMaskedDiffusion:
    """A random relay model in evaluation mode.

    Args:
        tokenizer: decides vocabulary, [PAD] and [MASK]; without one there are 64 tokens, of which the last is [MASK].
        seed: seed of the weights; torch's global generator is seeded with it.
        open_channel: gives the channel random weights. A fresh LayerNorm channel changes nothing, so that a test with
            one would not notice a state that is lost.
        text: fields of the backbone that differ from those of `tiny_text_config`.
        relay: fields of `RelayConfig`; blocks have 8 positions unless `block_size` says otherwise.
    """
    known: dict[str, Any] = {"mask_token_id": 63}
    if tokenizer is not None:
        text = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **(text or {})}
        known["mask_token_id"] = tokenizer.mask_token_id
    torch.manual_seed(seed)
    config = RelayConfig(text_config=tiny_text_config(**text or {}), **{"block_size": 8, **known, **relay})
    model = RelayForMaskedDiffusion(config).eval()
    if open_channel:
        for parameter in model.relay.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
    return model


def tiny_decoder(tokenizer: PreTrainedTokenizerBase, **text: Any) -> Qwen2ForCausalLM:
    """A random causal decoder, initialised so that it can be trained: `convert` makes a relay model of it.

    Args:
        tokenizer: decides vocabulary, [PAD] and the stop token.
        text: fields that differ from those of `tiny_text_config`.
    """
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    fields = {"vocab_size": len(tokenizer), "initializer_range": 0.1, **special, **text}
    torch.manual_seed(0)
    return Qwen2ForCausalLM(tiny_text_config(**fields))
