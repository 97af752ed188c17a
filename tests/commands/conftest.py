"""A tiny model with its tokenizer in a folder, and rows to train it on."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from relay_hf.cli import main
from relay_hf.testing import all_tokens_but

from ..trainers.text import build_text_model, build_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random relay model that only writes a few letters, with an open channel, so that the relay matters."""
    folder = tmp_path_factory.mktemp("models") / "base"
    model, tokenizer = build_text_model(text={"max_position_embeddings": 512}), build_tokenizer()
    model.relay.norm.weight.data.fill_(0.7)
    model.generation_config.update(suppress_tokens=all_tokens_but(tokenizer, "abcdefgh "), unmasking_threshold=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twelve short conversations as `prepare_data` writes them."""
    talk = [
        {
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "completion": [{"role": "assistant", "content": "abcdefgh"[i % 4 :]}],
            "source": "code",
        }
        for i in range(12)
    ]
    return write_rows(tmp_path / "rows.jsonl", talk)


@pytest.fixture
def recipe(tmp_path: Path, checkpoint: Path, rows: Path) -> Callable[..., Path]:
    """Writes a recipe of two steps; arguments replace its options."""

    def write(**options: Any) -> Path:
        fields = {
            "model_name_or_path": str(checkpoint),
            "dataset_name": str(rows),
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "learning_rate": "1e-2",
            "per_device_train_batch_size": 4,
            "max_length": 64,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**fields, **options}))
        return path

    return write


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs a command that must fail with exit code 2 and one line, which is returned."""

    def run(*argv: Any) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in argv]) == 2
        last = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
        assert last.startswith("relay-hf: error: ")
        return last.removeprefix("relay-hf: error: ")

    return run
