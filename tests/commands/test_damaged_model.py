"""A model of which one file is damaged: one sentence and exit code 2 in every command, an error of files in Python."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from relay_hf import RelayForMaskedDiffusion
from relay_hf.cli import main

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "pickle": lambda path: path.write_bytes(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s."),
    "list": lambda path: path.write_text("[1, 2]"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


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


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_generate_with_a_damaged_file_is_one_sentence(
    damaged: Callable[[str, str], Path], capsys: pytest.CaptureFixture, name: str, damage: str
) -> None:
    said = assert_one_sentence(["generate", str(damaged(name, damage)), "Hi", "--max_new_tokens", "2"], capsys)
    assert str(Path("damaged")) in said


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
