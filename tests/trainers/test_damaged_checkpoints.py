"""Each file of a checkpoint cut off, removed or replaced: never a traceback, never a silent resume of what is left."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay_hf.trainers import RelayTrainer
from relay_hf.trainers.whole_checkpoints import FREE, LIST_FILE, find_problem

from .conftest import build_model, build_trainer
from .test_resume import RecordBegin

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    build_trainer(folder, **SAVING).train()
    return folder


def names(checkpoint: Path) -> list[str]:
    return [path.name for path in sorted(checkpoint.iterdir()) if path.suffix not in FREE]


def resize(share: float) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "emptied": resize(0),
    "halved": resize(0.5),
    "without its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "removed": Path.unlink,
    "garbage": lambda path: path.write_bytes(b"\x80garbage" * 9),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoint_with_a_damaged_file_is_not_whole(saved: Path, tmp_path: Path, damage: str) -> None:
    assert find_problem(saved / "checkpoint-4") is None
    assert len(names(saved / "checkpoint-4")) > 8
    for name in names(saved / "checkpoint-4"):
        checkpoint = tmp_path / f"{name}-{damage}"
        shutil.copytree(saved / "checkpoint-4", checkpoint)
        DAMAGES[damage](checkpoint / name)
        problem = find_problem(checkpoint)
        # Without the list, the rest is as an earlier version wrote it. Its last byte ends a line.
        if name == LIST_FILE and damage in ("removed", "without its last byte"):
            assert problem is None
        else:
            assert f"`{name}`" in str(problem), name


@pytest.mark.parametrize("name", ["rollout_buffer_0.safetensors", "optimizer.pt", "weight_average.safetensors"])
def test_resume_takes_the_checkpoint_before_or_names_the_file(
    make_trainer: Callable[..., RelayTrainer], saved: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(saved, tmp_path / "run")
    resize(0.5)(tmp_path / "run" / "checkpoint-4" / name)
    with pytest.raises(ValueError, match=f"checkpoint-4` is not whole: `{name}` has .* bytes, but was written with"):
        make_trainer(**SAVING).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    began: list[int] = []
    trainer = make_trainer(**SAVING)
    trainer.add_callback(RecordBegin(began))
    trainer.train(resume_from_checkpoint=True)
    assert began == [2]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"block_size": 2}, "of a model with `block_size=4`, but this one has 2"),
        ({"mask_token_id": 1}, "of a model with `mask_token_id=39`, but this one has 1"),
    ],
)
def test_resume_of_another_model_raises(
    make_trainer: Callable[..., RelayTrainer], saved: Path, other: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(build_model(**other), **SAVING).train(resume_from_checkpoint=str(saved / "checkpoint-4"))
