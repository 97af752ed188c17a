"""A demo that is interrupted goes on from what it has trained, and ends where an uninterrupted one does."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from relay_hf.cli import main
from relay_hf.demo import study

SIZES = {
    "size": 4, "steps": 3, "warmup-steps": 3, "puzzles": 20, "test-puzzles": 4, "batch-size": 4, "hidden-size": 32,
    "layers": 1,
}  # fmt: skip
SMALL = [text for name, value in SIZES.items() for text in (f"--{name}", str(value))]
WEIGHTS = "relay-sudoku-4x4/model.safetensors"


class CtrlC(TrainerCallback):
    """Comes in the middle of the training."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Called with an objective: its adaptation is interrupted. Returns what is trained from then on."""
    really = study.train_model
    monkeypatch.setattr("relay_hf.demo.subprocess.run", lambda *args, **kwargs: None)
    monkeypatch.setattr("relay_hf.demo.pace.SAMPLE_SECONDS", 0.01)

    def watch(interrupted: str | None = None) -> list[str]:
        begun: list[str] = []

        def train(*args: Any, **kwargs: Any) -> float:
            name = "warmup" if kwargs.get("is_warmup") else kwargs["objective"]
            begun.append(name)
            return really(*args, **kwargs, callbacks=[CtrlC()] if name == interrupted else [])

        monkeypatch.setattr(study, "train_model", train)
        return begun

    return watch


def demo(folder: Path, *options: str) -> int:
    return main(["demo", *SMALL, "--output-dir", str(folder), *options])


def evaluations(folder: Path) -> list[Any]:
    return [run["evaluations"] for run in json.loads((folder / "results.json").read_text())["runs"]]


@pytest.mark.parametrize(
    ("interrupted", "left"),
    [("warmup", ["warmup", "masked", "rollout", "relay"]), ("relay", ["relay"])],
)
def test_interrupted_demo_goes_on_and_equals_an_uninterrupted_one(
    interrupted: str, left: list[str], trainings: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trainings()
    assert demo(tmp_path / "whole") == 0
    trainings(interrupted)
    assert demo(tmp_path / "twice") == 130
    shown = capsys.readouterr()
    command = f"relay-hf demo {' '.join(SMALL)} --output-dir {tmp_path / 'twice'}"
    assert "goes on with what is trained" in shown.out
    assert f"`{command} --fresh` starts anew" in shown.out
    assert not (tmp_path / "twice" / "results.json").exists()

    begun = trainings()
    assert demo(tmp_path / "twice") == 0
    assert begun == left
    assert evaluations(tmp_path / "twice") == evaluations(tmp_path / "whole")
    once, twice = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "twice"))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert not (tmp_path / "twice" / "unfinished").exists()


@pytest.mark.parametrize(("options", "changed"), [(["--seeds", "2"], "seeds"), (["--extra-clues", "2"], "extra_clues")])
def test_unfinished_demo_with_other_settings_raises(
    options: list[str], changed: str, trainings: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trainings("masked")
    assert demo(tmp_path) == 130
    begun = trainings()
    assert demo(tmp_path, *options) == 2
    assert f"unfinished work of a demo with other {changed}" in capsys.readouterr().err
    assert begun == []
    assert demo(tmp_path, *options, "--fresh") == 0
    assert begun[0] == "warmup"


def test_unfinished_demo_of_other_versions_raises(
    trainings: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trainings("masked")
    assert demo(tmp_path) == 130
    monkeypatch.setattr("relay_hf.demo.keeping.versions", lambda: {"torch": "9.9"})
    assert demo(tmp_path) == 2
    assert "with other versions" in capsys.readouterr().err
