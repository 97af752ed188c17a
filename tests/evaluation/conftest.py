"""Random models that write a few letters; problems and tasks of local files to evaluate them on."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from relay_hf import RelayForMaskedDiffusion
from relay_hf.testing import CHAT_TEMPLATE, all_tokens_but

NAMES = ["add", "sub", "mul", "neg", "inc"]
POSITIONS = 640


@pytest.fixture
def text_model(
    make_model: Callable[..., RelayForMaskedDiffusion], tokenizer: PreTrainedTokenizerFast
) -> Callable[..., RelayForMaskedDiffusion]:
    """Models of bytes that write nothing but a few letters."""

    def make(**options: Any) -> RelayForMaskedDiffusion:
        model = make_model(
            text={"vocab_size": len(tokenizer)}, mask_token_id=tokenizer.mask_token_id, open_channel=True, **options
        )
        model.generation_config.suppress_tokens = all_tokens_but(tokenizer, "abcdefgh ")
        model.generation_config.unmasking_threshold = 0.3
        return model

    return make


@pytest.fixture
def checkpoint(text_model: Callable[..., RelayForMaskedDiffusion], tokenizer: Any, tmp_path: Path) -> Path:
    model = text_model(token_shift=True)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks of three questions, as YAML (JSON is YAML) with a local file; choices follow a space."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"{n} and", "choices": ["a", "bcd", "xyz"], "answer": n % 3} for n in range(3)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(folder / "rows.jsonl"), "cache_dir": str(tmp_path / "cache")},
        "test_split": "train",
        "doc_to_text": "{{question}}",
    }
    choose = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
    write = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["a"], "max_gen_toks": 10},
        "metric_list": [{"metric": "exact_match"}],
    }
    for name, task in {"choose": choose, "write": write}.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))
    return folder


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
