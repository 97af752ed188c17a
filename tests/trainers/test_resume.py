"""A run that stops and goes on gives what the uninterrupted run gives: buffer, averages, randomness and all."""

import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback

from relay_hf import RelayForMaskedDiffusion
from relay_hf.trainers import RelayTrainer, checkpoints
from relay_hf.trainers.whole_checkpoints import finish_checkpoint

from .conftest import build_model, build_trainer
from .killed_run import SETTINGS, train_and_die

JITTERED = {"threshold_jitter": 0.2, "ema_decay": 0.9, "relay_learning_rate": 1e-2}


def losses(trainer: RelayTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [{"objective": "relay", **JITTERED}, {"objective": "rollout", "threshold_jitter": 0.2}, {"objective": "masked"}],
    ids=lambda options: options["objective"],
)
def test_resume_after_a_stop_equals_the_uninterrupted_run(
    make_trainer: Callable[..., RelayTrainer], tmp_path: Path, options: dict
) -> None:
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **options}
    whole = make_trainer(output_dir=tmp_path / "whole", **saving)
    whole.train()

    resumed = make_trainer(build_model(seed=7), output_dir=tmp_path / "resumed", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for (name, mine), (_, theirs) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_resume_without_the_buffer_would_differ(make_trainer: Callable[..., RelayTrainer], tmp_path: Path) -> None:
    """The test above can fail: dropping the buffer's file changes the losses."""
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "unmasking_threshold": 0.9}
    whole = make_trainer(output_dir=tmp_path / "whole", **saving)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    (checkpoint / "rollout_buffer_0.safetensors").unlink()
    (checkpoint / "checkpoint_files.json").unlink()  # it would name the missing file
    resumed = make_trainer(output_dir=tmp_path / "resumed", **saving)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[3:] != losses(whole)[3:]


def test_best_model_at_the_end_is_the_average_that_scored_best(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset
) -> None:
    trainer = make_trainer(
        ema_decay=0.9,
        max_steps=6,
        learning_rate=0.5,
        # At such a rate the loss grows, so that the best model is the first and not the last.
        greater_is_better=False,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        trainer_options={"eval_dataset": dataset.select(range(8))},
    )
    trainer.train()
    scores = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(scores) < scores[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(scores))


def test_resume_without_an_average_starts_it_from_the_loaded_weights(
    make_trainer: Callable[..., RelayTrainer], tmp_path: Path
) -> None:
    make_trainer(max_steps=2, save_strategy="steps", save_steps=2).train()
    resumed = make_trainer(build_model(seed=7), max_steps=2, ema_decay=0.9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    saved = RelayForMaskedDiffusion.from_pretrained(tmp_path / "run" / "checkpoint-2")
    for mine, theirs in zip(resumed.model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> RelayTrainer:
    trainer = build_trainer(tmp_path_factory.mktemp("uninterrupted"), **SETTINGS)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("moment", "last_whole"), [("step", 4), ("save", 2), ("end", 2)])
def test_resume_after_sigkill_equals_the_uninterrupted_run(
    uninterrupted: RelayTrainer, tmp_path: Path, moment: str, last_whole: int
) -> None:
    killed = get_context("fork").Process(target=train_and_die, args=(tmp_path, moment))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").exists() == (moment != "save")

    resumed = build_trainer(tmp_path, build_model(seed=7), **SETTINGS)
    began: list[int] = []
    resumed.add_callback(RecordBegin(began))
    resumed.train(resume_from_checkpoint=True)
    assert began == [last_whole]
    assert losses(resumed) == losses(uninterrupted)
    for mine, theirs in zip(resumed.model.parameters(), uninterrupted.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_save_older_checkpoints_are_deleted_when_the_new_one_is_whole(
    make_trainer: Callable[..., RelayTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever order the Trainer writes and deletes in."""
    seen: list[list[str]] = []

    def finish(checkpoint: Path) -> None:
        seen.append(sorted(path.name for path in checkpoint.parent.glob("checkpoint-*")))
        assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= set(
            path.name for path in checkpoint.iterdir()
        )
        finish_checkpoint(checkpoint)

    monkeypatch.setattr(checkpoints, "finish_checkpoint", finish)
    trainer = make_trainer(max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1)
    trainer.train()
    assert seen[1:] == [
        ["checkpoint-2", "checkpoint-4", "checkpoint-4.unfinished"],
        ["checkpoint-4", "checkpoint-6", "checkpoint-6.unfinished"],
    ]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    saved = torch.load(tmp_path / "run" / "checkpoint-6" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == trainer.args.save_total_limit == 1


class RecordBegin(TrainerCallback):
    """Notes the step at which training begins."""

    def __init__(self, began: list[int]) -> None:
        self.began = began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began.append(state.global_step)


def test_resume_without_a_whole_checkpoint_raises(make_trainer: Callable[..., RelayTrainer], tmp_path: Path) -> None:
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(**saving).train()
    folder = tmp_path / "run"
    (folder / "checkpoint-2" / "trainer_state.json").unlink()
    (folder / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')
    with pytest.raises(ValueError, match="has no checkpoint that is whole: leave out"):
        make_trainer(**saving).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"checkpoint-2` is not whole: `trainer_state.json` is missing"):
        make_trainer(**saving).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    with pytest.raises(ValueError, match=r"nowhere` is no folder|nowhere is no folder"):
        make_trainer(**saving).train(resume_from_checkpoint=str(folder / "nowhere"))


def test_resume_with_another_batch_size_keeps_training(
    make_trainer: Callable[..., RelayTrainer], tmp_path: Path
) -> None:
    make_trainer(max_steps=2, save_strategy="steps", save_steps=2).train()
    for size in (2, 6):
        resumed = make_trainer(max_steps=4, per_device_train_batch_size=size, output_dir=tmp_path / str(size))
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert len(resumed.buffer.rows) == size


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_checkpoint_holds_the_average_that_was_evaluated(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset, tmp_path: Path, peft_config: LoraConfig | None
) -> None:
    base = build_model()
    base.save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        base,
        ema_decay=0.9,
        learning_rate=0.1,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        trainer_options={"eval_dataset": dataset.select(range(8)), "peft_config": peft_config},
    )
    trainer.train()
    score = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    saved = RelayForMaskedDiffusion.from_pretrained(checkpoint if peft_config is None else tmp_path / "base")
    if peft_config is not None:
        saved = PeftModel.from_pretrained(saved, checkpoint, is_trainable=True)
    again = make_trainer(saved, trainer_options={"eval_dataset": dataset.select(range(8))}).evaluate()
    assert again["eval_loss"] == pytest.approx(score)
