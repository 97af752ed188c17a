"""A model of which one file is damaged: one sentence and exit code 2 in every command, an error of files in Python."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from relay_hf import RelayForMaskedDiffusion
from relay_hf.cli import main
from relay_hf.evaluation.weights import hash_weights

from ..conftest import text_config

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "pickle": lambda path: path.write_bytes(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s."),
    "list": lambda path: path.write_text("[1, 2]"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "removed": lambda path: path.unlink(),
}
# Without these two nothing is known of a model; the others may be missing.
NEEDED = ("config.json", "model.safetensors")
CASES = [(name, damage) for name in FILES for damage in DAMAGES if damage != "removed" or name in NEEDED]


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    def make(name: str, damage: str) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(checkpoint, folder)
        DAMAGES[damage](folder / name)
        return folder

    return make


def assert_one_sentence(argv: list[str], capsys: pytest.CaptureFixture) -> str:
    assert main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("relay-hf: error: ")
    return said


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_generate_with_a_damaged_file_is_one_sentence(
    damaged: Callable[[str, str], Path], capsys: pytest.CaptureFixture, name: str, damage: str
) -> None:
    said = assert_one_sentence(["generate", str(damaged(name, damage)), "Hi", "--max_new_tokens", "2"], capsys)
    assert str(Path("damaged")) in said


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_serve_with_a_damaged_file_is_one_sentence(
    damaged: Callable[[str, str], Path],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damage: str,
) -> None:
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: pytest.fail("The server started."))
    assert "damaged" in assert_one_sentence(["serve", str(damaged(name, damage))], capsys)


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_convert_a_damaged_source_is_one_sentence_and_writes_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture, name: str, damage: str
) -> None:
    source, output = tmp_path / "damaged", tmp_path / "converted"
    Qwen2ForCausalLM(text_config(vocab_size=len(tokenizer) + 2)).save_pretrained(source)
    tokenizer.save_pretrained(source)
    DAMAGES[damage](source / name)
    said = assert_one_sentence(["convert", str(source), str(output), "--mask_token_id", str(len(tokenizer))], capsys)
    assert "damaged" in said
    assert not output.exists()


@pytest.mark.parametrize("damage", ["pickle", "folder"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "README.md"])
def test_card_of_a_damaged_model_is_one_sentence(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str, damage: str
) -> None:
    folder, run = tmp_path / "damaged", tmp_path / "run"
    shutil.copytree(checkpoint, folder)
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- relay\n---\n# A model of mine\n")
    weights = hash_weights(RelayForMaskedDiffusion.from_pretrained(folder))
    settings = {"model": "x", "weights": weights, "problems": "y", "dtype": "torch.float32", "benchmark": "z.jsonl"}
    settings |= {"limit": None, "stop_at_fence": True, "generation_options": "{}", "max_new_tokens": 8}
    settings |= {"time_limit": 1.0, "batch_size": 1}
    costs = dict.fromkeys(("denoise_forwards", "commit_forwards", "prefill_forwards"), 1.0)
    row = {"label": "x", "metrics": {"pass@1": 0.5}, "samples": 1, "threshold": 0.9, **costs}
    run.mkdir()
    (run / "results.json").write_text(json.dumps({"settings": settings, "results": [{"row": row, "new_tokens": 1.0}]}))
    DAMAGES[damage](folder / name)
    assert "damaged" in assert_one_sentence(["card", str(folder), str(run)], capsys)


@pytest.mark.parametrize("command", ["chat", "train", "push", "eval"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_command_with_a_damaged_file_is_one_sentence(
    damaged: Callable[[str, str], Path],
    recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture,
    name: str,
    command: str,
) -> None:
    folder = str(damaged(name, "cut off"))
    argv = {"train": ["--config", str(recipe(model_name_or_path=folder))], "push": [folder, "me/relay"]}
    assert_one_sentence([command, *argv.get(command, [folder])], capsys)


@pytest.mark.parametrize("damage", ["cut off", "pickle", "folder"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_from_pretrained_with_a_damaged_file_raises(
    damaged: Callable[[str, str], Path], name: str, damage: str
) -> None:
    with pytest.raises((OSError, ValueError), match="damaged"):
        RelayForMaskedDiffusion.from_pretrained(damaged(name, damage))


def test_from_pretrained_weights_of_another_size_raises(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(checkpoint, folder)
    fields = json.loads((folder / "config.json").read_text())
    fields["text_config"]["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(OSError, match=r"The weights of `.*other` cannot be read"):
        RelayForMaskedDiffusion.from_pretrained(folder)


def test_from_pretrained_index_that_names_a_missing_file_raises(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    RelayForMaskedDiffusion.from_pretrained(checkpoint).save_pretrained(folder, max_shard_size="20KB")
    (shard, *_) = sorted(folder.glob("model-*"))
    shard.unlink()
    with pytest.raises(OSError, match=rf"index.json` cannot be read \(it names `{shard.name}`, which is missing\)"):
        RelayForMaskedDiffusion.from_pretrained(folder)
