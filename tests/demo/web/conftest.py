"""Tiny random models, one for boards of 4x4 cells and one for text, and their pages."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.tasks.sudoku import make_sudoku_tokenizer
from relay_hf.testing import CHAT_TEMPLATE, all_tokens_but, byte_tokenizer

from ...conftest import text_config

QUESTION = "1.3..4..2..4.12."
# A model may write any of these, and a page must show them as they are.
MARKUP = "<b>&{x}$'\"\n"


def make_model(tokenizer: PreTrainedTokenizerFast, **relay: Any) -> RelayForMaskedDiffusion:
    """Random weights, the channel's included."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    text = text_config(**sizes, initializer_range=0.3, pad_token_id=tokenizer.pad_token_id)
    config = RelayConfig(text_config=text, mask_token_id=tokenizer.mask_token_id, **relay)
    model = RelayForMaskedDiffusion(config).eval()
    if model.config.relay_channel != "none":
        torch.nn.init.normal_(model.relay.norm.weight, std=0.7)
    return model


@pytest.fixture(scope="session")
def board_tokenizer() -> PreTrainedTokenizerFast:
    return make_sudoku_tokenizer(4)


@pytest.fixture(scope="session")
def board_model(board_tokenizer: PreTrainedTokenizerFast) -> RelayForMaskedDiffusion:
    return make_model(board_tokenizer, block_size=None)


@pytest.fixture(scope="session")
def text_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    return tokenizer


@pytest.fixture(scope="session")
def text_model(text_tokenizer: PreTrainedTokenizerFast) -> RelayForMaskedDiffusion:
    """Writes nothing but markup."""
    model = make_model(text_tokenizer, block_size=8, token_shift=True)
    model.generation_config.suppress_tokens = all_tokens_but(text_tokenizer, MARKUP)
    model.generation_config.unmasking_threshold = 0.3
    return model


@pytest.fixture(scope="package")
def pages(
    board_model: RelayForMaskedDiffusion,
    board_tokenizer: PreTrainedTokenizerFast,
    text_model: RelayForMaskedDiffusion,
    text_tokenizer: PreTrainedTokenizerFast,
) -> Iterator[dict[str, str]]:
    """Addresses of two pages, "board" and "text", which replay without pauses."""
    from relay_hf.demo.web import page
    from relay_hf.demo.web.runs import Runner

    runners = {"board": Runner(board_model, board_tokenizer), "text": Runner(text_model, text_tokenizer)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "PAUSE", 0)
        built = {name: page.build_page(runner, f"tiny {name}") for name, runner in runners.items()}
        yield {name: page.launch_page(blocks, "127.0.0.1", free_port()) for name, blocks in built.items()}
        for blocks in built.values():
            blocks.close(verbose=False)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
