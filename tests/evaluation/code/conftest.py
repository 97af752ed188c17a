"""A small benchmark, and a random model to run on it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from relay_hf import RelayForMaskedDiffusion

from ...conftest import CHAT_TEMPLATE, all_tokens_but

NAMES = ["add", "sub", "mul", "neg", "inc"]
POSITIONS = 640


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """Five problems in the format of HumanEval, of different lengths."""
    records = [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f'def {name}(a, b):\n    """{name} a, b{"!" * 7 * number}"""\n',
            "entry_point": name,
            "canonical_solution": "    return a\n",
            "test": "def check(candidate):\n    assert candidate(1, 2) == 1",
        }
        for number, name in enumerate(NAMES)
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def model(
    make_model: Callable[..., RelayForMaskedDiffusion], tokenizer: PreTrainedTokenizerFast
) -> RelayForMaskedDiffusion:
    """A random model of bytes that writes nothing but a few letters."""
    model = make_model(
        text={"vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS},
        mask_token_id=tokenizer.mask_token_id,
        open_channel=True,
        token_shift=True,
    )
    model.generation_config.suppress_tokens = all_tokens_but(tokenizer, "abcdefgh \n`")
    return model
