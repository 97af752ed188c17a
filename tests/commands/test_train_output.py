"""The output folder of `relay-hf train`, what is said before it writes there, and how an interrupted run goes on."""

import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from relay_hf import RelayTrainer
from relay_hf.cli import main
from relay_hf.commands.train_output import resume_command

from .test_train import assert_equal_weights, train


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else set()


def test_dry_run_says_what_would_be_trained_and_writes_nothing(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = recipe(max_steps=7, gradient_accumulation_steps=2, report_to="none")
    before = files(tmp_path)
    assert main(["train", "--config", str(path), "--dry_run", "true"]) == 0
    shown = capsys.readouterr().out
    assert files(tmp_path) == before
    assert "data        12 rows, " in shown
    assert "steps       7 of 8 rows (4 per process, 2 accumulated), each of which stays for several steps" in shown
    assert "learned 'abcdefgh" in shown
    assert "min for 7 steps like it" in shown
    assert "nothing is written" in shown


def test_summary_comes_before_training_and_changes_nothing_of_it(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe())
    shown = capsys.readouterr().out
    assert shown.index("relay-hf: what is trained") < shown.index("step 1/2  loss ")
    assert "{" not in shown, "the lines are for people"
    monkeypatch.setattr(RelayTrainer, "summary", lambda self: "")
    train(recipe(), output_dir=tmp_path / "silent")
    assert_equal_weights(tmp_path / "run", tmp_path / "silent")


def interrupt_in(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_loss = RelayTrainer.compute_loss

    def interrupted_loss(self: RelayTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, *args, **kwargs)
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(RelayTrainer, "compute_loss", interrupted_loss)


def test_interrupted_run_prints_the_command_that_finishes_it(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = recipe(use_peft=True, lora_r=2, max_steps=3)
    train(path, output_dir=tmp_path / "whole")
    folder = tmp_path / "a folder's name"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_in(2, patch)
        assert main(["train", "--config", str(path), f"--output_dir={folder}"]) == 130
    lines = capsys.readouterr().out.splitlines()
    assert "relay-hf: step 2 of 3 is saved; this goes on from there:" in lines
    typed = shlex.split(lines[-1])
    assert typed[:2] == ["relay-hf", "train"]
    assert main(typed[1:]) == 0
    assert_equal_weights(folder / "merged", tmp_path / "whole" / "merged")

    written = capsys.readouterr().out.splitlines()[-1]
    assert main([*shlex.split(written)[1:], "--max_new_tokens", "4"]) == 0


@pytest.mark.parametrize(
    "given",
    [
        ["--resume_from_checkpoint", "true", "--max_steps", "3"],
        ["--max_steps", "3", "--resume-from-checkpoint=a b"],
        ["--max_steps", "3"],
    ],
)
def test_resume_command_names_one_checkpoint(given: list[str]) -> None:
    command = resume_command("relay-hf train", ["--config", "my recipe.yaml", *given], Path("run/checkpoint-2"))
    expected = "relay-hf train --config 'my recipe.yaml' --max_steps 3 --resume_from_checkpoint run/checkpoint-2"
    assert command == expected


@pytest.mark.parametrize("left", ["checkpoint-3", "merged", "model.safetensors", "adapter_config.json"])
def test_output_of_another_run_is_refused_and_kept(
    recipe: Callable[..., Path], refuse: Callable[..., str], tmp_path: Path, left: str
) -> None:
    (tmp_path / "run" / left).mkdir(parents=True)
    message = refuse("train", "--config", recipe())
    assert f"`output_dir={tmp_path / 'run'}` holds `{left}` of another run" in message
    assert "`--resume_from_checkpoint true`" in message
    assert "`--overwrite_output_dir true`" in message
    assert files(tmp_path / "run") == {left}


def test_output_with_files_that_are_no_runs_is_used(recipe: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train(recipe(max_steps=1))
    assert {"notes.txt", "model.safetensors"} <= files(tmp_path / "run")


def test_overwriting_removes_what_the_earlier_run_left(recipe: Callable[..., Path], tmp_path: Path) -> None:
    train(recipe(save_strategy="steps", save_steps=1, max_steps=2))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train(recipe(max_steps=1, use_peft=True, lora_r=2, overwrite_output_dir=True))
    left = files(tmp_path / "run")
    assert {"notes.txt", "adapter_model.safetensors", "merged/model.safetensors"} <= left
    assert not left & {"model.safetensors", "checkpoint-1", "checkpoint-2"}


def test_overwriting_the_model_that_is_trained_is_refused(
    recipe: Callable[..., Path], refuse: Callable[..., str], tmp_path: Path
) -> None:
    train(recipe(max_steps=1))
    model = tmp_path / "run"
    before = load_file(model / "model.safetensors")
    message = refuse("train", "--config", recipe(overwrite_output_dir=True, model_name_or_path=str(model)))
    assert f"would remove `{model}`, which this run reads" in message
    assert load_file(model / "model.safetensors").keys() == before.keys()


def test_resume_that_would_leave_an_older_merged_model_is_refused(
    recipe: Callable[..., Path], refuse: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "run" / "merged").mkdir(parents=True)
    message = refuse("train", "--config", recipe(resume_from_checkpoint=True))
    assert "holds a merged model, which this run would leave older" in message


@pytest.mark.parametrize(
    "options", [{"resume_from_checkpoint": True}, {"mask_token_id": 999}, {"dataset_name": "no.csv"}]
)
def test_refused_run_leaves_no_empty_folder(
    recipe: Callable[..., Path], refuse: Callable[..., str], tmp_path: Path, options: dict[str, Any]
) -> None:
    refuse("train", "--config", recipe(output_dir=str(tmp_path / "new" / "run"), **options))
    assert not (tmp_path / "new").exists()
