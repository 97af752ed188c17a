"""What an unfinished demo has trained, so that the next one goes on from there."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel

from ..hub_cards import versions
from ..startup.whole_file import write_whole
from .arguments import DemoArguments

# What does not change the results.
WITHOUT_EFFECT = ("output_dir", "fresh")


class KeptStudy:
    """The folder `unfinished` beside the results, which goes when the demo is done.

    Args:
        arguments: the demo's arguments, as given.
        puzzles: the puzzles of both splits.

    Attributes:
        folder: the path of the folder.
        plan: the last argument of `keep_plan`, in this run or before; None at first.

    Raises:
        ValueError: the folder holds the work of other settings, other puzzles or other versions of the libraries.
    """

    def __init__(self, arguments: DemoArguments, puzzles: DatasetDict) -> None:
        self.folder = Path(arguments.output_dir).resolve() / "unfinished"
        if arguments.fresh:
            self.remove()
        columns = [split[name] for split in puzzles.values() for name in ("question", "answer")]
        settings = {name: value for name, value in asdict(arguments).items() if name not in WITHOUT_EFFECT}
        settings |= {"versions": versions(), "boards": hashlib.sha256("".join(chain(*columns)).encode()).hexdigest()}
        kept = _read(self.folder / "settings.json")
        if kept is not None and (changed := [name for name in settings if kept.get(name) != settings[name]]):
            raise ValueError(
                f"`{self.folder}` holds the unfinished work of a demo with other {', '.join(changed)}: give the same "
                "again to go on with it, choose another `--output-dir`, or add `--fresh` to start anew."
            )
        # Now, because a folder that cannot be written would otherwise show after all the training.
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / "settings.json", settings)
        self.plan: dict[str, Any] | None = _read(self.folder / "plan.json")

    def keep_plan(self, plan: dict[str, Any]) -> None:
        """Keeps what was decided about the sizes of the study."""
        _write(self.folder / "plan.json", plan)
        self.plan = plan

    def trained(self, name: str, model: PreTrainedModel, train: Callable[..., float]) -> float:
        """Trains in place, or loads what was trained before; returns the seconds that training took.

        Args:
            name: name of the stage.
            model: model that receives the weights.
            train: trains in the stage's `folder`; returns the seconds.
        """
        folder = self.folder / name
        weights = folder / "model.safetensors"
        if not weights.exists():
            seconds = train(folder=folder)
            _write(folder / "trained.json", {"seconds": seconds})
            save_model(model, str(weights) + ".part")
            os.replace(str(weights) + ".part", weights)
        else:
            print("trained before", flush=True)
            load_model(model, weights)
        return _read(folder / "trained.json")["seconds"]

    def evaluated(self, name: str, evaluate: Callable[[], Any]) -> Any:
        """What `evaluate` gives, as JSON gives it back; or what it gave before."""
        path = self.folder / name / "evaluated.json"
        if not path.exists():
            _write(path, evaluate())
        return _read(path)

    def remove(self) -> None:
        """Forgets everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write(path: Path, content: Any) -> None:
    """All or nothing: a half-written file would be read by the next run."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
