"""What differs between versions of transformers, and a word about versions that nobody tested."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import Qwen2Config, Qwen3Config

from relay_hf import RelayConfig
from relay_hf.modeling import versions_relay
from relay_hf.modeling.versions_relay import NEWEST_TESTED, slice_logits_to_keep

ROOT = Path(__file__).parents[2]
IMPORT = """
import sys, transformers.processing_utils  # it puts another module in the place of `transformers`
sys.modules["transformers"].__version__ = sys.argv[1]
import relay_hf, relay_hf.trainers
"""


def test_import_with_a_newer_transformers_warns_in_one_line() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IMPORT, "5.100.1"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = [line for line in shown.stderr.splitlines() if "newest version that relay_hf was tested with" in line]
    assert len(lines) == 1
    assert f"transformers 5.100.1 is newer than {NEWEST_TESTED}" in lines[0]


@pytest.mark.parametrize(
    ("version", "warns"),
    [("5.19.0", False), (NEWEST_TESTED + ".9", False), ("5.9.0", False), ("5.25.0.dev0", True), ("6.0.0", True)],
)
def test_only_a_newer_minor_version_is_warned_of(version: str, warns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(versions_relay.logger, "warning_once", said.append)
    versions_relay.warn_of_untested(version)
    assert bool(said) == warns


def test_newest_tested_version_is_the_one_that_ci_installs() -> None:
    pinned = re.search(r"^transformers==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned[1] == NEWEST_TESTED


def test_oldest_versions_are_those_of_the_project() -> None:
    """pip compares them in full: a floor that no pin is at is not tested."""
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    text = (ROOT / "pyproject.toml").read_text()
    floors = dict(
        re.findall(r'"([\w-]+)>=([\d.]+)"', text[text.index("dependencies = [") : text.index("[project.opt")])
    )
    assert pins.keys() == floors.keys()
    assert all(pins[name].removesuffix(".0") == floors[name] for name in floors)


@pytest.mark.parametrize("given", [None, {"model_type": "qwen3", "vocab_size": 9}, {"vocab_size": 9}, Qwen3Config()])
def test_text_config_is_a_configuration_however_it_was_given(given: object) -> None:
    config = RelayConfig(text_config=given)
    is_qwen3 = isinstance(given, Qwen3Config) or (isinstance(given, dict) and "model_type" in given)
    assert type(config.text_config) is (Qwen3Config if is_qwen3 else Qwen2Config)
    assert config.text_config.vocab_size == (9 if isinstance(given, dict) else Qwen2Config().vocab_size)
    assert RelayConfig.from_dict(config.to_dict()).text_config.to_dict() == config.text_config.to_dict()


@pytest.mark.parametrize("has_own", [True, False])
def test_slice_logits_to_keep_same_with_and_without_transformers_own(
    has_own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_own:
        monkeypatch.delattr(transformers.modeling_utils, "slice_logits_to_keep", raising=False)
    tensor = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    expected: list[tuple[int | Tensor, Tensor]] = [
        (0, tensor),
        (2, tensor[:, 2:]),
        (torch.tensor([0, 3]), tensor[:, [0, 3]]),
        (mask, tensor[mask]),
        (torch.tensor([[0, 1], [2, 3]]), torch.stack([tensor[0, :2], tensor[1, 2:]])),
    ]
    for asked, kept in expected:
        assert torch.equal(slice_logits_to_keep(tensor, asked), kept)
