"""Models and tokenizers by name: every failure is one sentence."""

import json
from pathlib import Path

import pytest

from relay_hf.hub.checks import check_contents
from relay_hf.loading.checkpoint import find_device, read_config
from relay_hf.startup.one_line import one_line
from relay_hf.testing import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


def test_config_argument_of_wrong_type_raises_one_sentence(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"block_size.*: change the argument, or the field in `config.json`\.$"
    ) as raised:
        read_config(str(folder), block_size="eight")
    assert "\n" not in str(raised.value)


def test_config_field_of_wrong_type_raises_the_same_sentence_in_a_push(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "relay_layer": "last"}))
    for read in (check_contents, lambda place: read_config(str(place))):
        with pytest.raises(ValueError, match=r"relay_layer.*change the argument, or the field in `config.json`"):
            read(folder)


@pytest.mark.parametrize("name", ["cpux", "mps:0"])
def test_device_that_is_not_there_raises(name: str) -> None:
    with pytest.raises(ValueError, match=f"`device={name}` is"):
        find_device(name)


def test_one_line_is_the_text_or_else_the_class() -> None:
    assert one_line(ValueError("a\n  b.")) == "a b."
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
