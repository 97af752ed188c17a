"""Text for the trainer: a chat tokenizer of one token a byte, and a model of one layer that fits it."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.testing import byte_tokenizer

from ..conftest import text_config

# The assistant's words and the token that ends its turn stand between the two marks that `assistant_only_loss` needs.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "A:{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}U:{{ message.content }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def build_tokenizer(**changes: str | None) -> PreTrainedTokenizerFast:
    """256 bytes, [EOS] = 256, [PAD] = 257, [MASK] = 258; `None` leaves one of them out."""
    return byte_tokenizer(chat_template=CHAT_TEMPLATE, **changes)


def build_text_model(text: dict[str, Any] | None = None, **overrides: Any) -> RelayForMaskedDiffusion:
    """A random model for these tokens; blocks of four without token shift, the channel closed as in a fresh one."""
    torch.manual_seed(0)
    backbone = text_config(**{"vocab_size": 259, "num_hidden_layers": 1, "initializer_range": 0.2, **(text or {})})
    return RelayForMaskedDiffusion(
        RelayConfig(text_config=backbone, **{"block_size": 4, "mask_token_id": 258, **overrides})
    )
