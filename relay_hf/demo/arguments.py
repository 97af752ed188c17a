"""What can be chosen on the command line of `relay-hf demo`."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..startup.options import option, require_at_least


@dataclass
class DemoArguments:
    """Arguments of the demo; the defaults take one CPU core about five minutes."""

    size: int = option(6, "Board size: 4, 6 or 9.")
    steps: int = option(200, "Adaptation steps of every objective.")
    warmup_steps: int = option(2500, "`masked` steps from scratch that all objectives start from.")
    seeds: int = option(1, "Repeat everything with this many training seeds.")
    full: bool = option(False, "Also adapt with `relay_sg`, the state without its gradient.")
    dataset: str | None = option(
        None, "CSV file or Hub id with columns `question` and `answer`, instead of the generator."
    )
    puzzles: int = option(4000, "Training puzzles, each shown under ever new symmetries.")
    extra_clues: int = option(4, "Clues given beyond those of a minimal puzzle.")
    test_puzzles: int = option(500, "Held-out puzzles; none is a symmetric twin of a training one.")
    batch_size: int = option(64, "Puzzles per training step.")
    hidden_size: int = option(64, "Width of the model.")
    layers: int = option(3, "Layers of the model.")
    minutes: float | None = option(
        None,
        "Use smaller batches and fewer steps if training would take longer than this. By default ten "
        "minutes, or as long as it takes if any size was chosen.",
    )
    fresh: bool = option(False, "Start anew instead of going on with what is unfinished.")
    output_dir: str = option("runs/demo", "Where results, picture and model are written.")

    def __post_init__(self) -> None:
        require_at_least(1, self, "steps", "warmup_steps", "seeds", "puzzles", "test_puzzles", "batch_size", "layers")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"`--minutes={self.minutes:g}` must be above 0; leave it out for the default.")
        if self.hidden_size < 32 or self.hidden_size % 32:
            raise ValueError(f"`--hidden_size={self.hidden_size}` must be a multiple of 32, the width of a head.")
        if self.size not in (4, 6, 9):
            raise ValueError(f"`--size={self.size}` is no size of a board: give 4, 6 or 9.")

    @property
    def objectives(self) -> list[str]:
        """In the order in which they are trained."""
        return ["masked", "rollout", "relay_sg", "relay"] if self.full else ["masked", "rollout", "relay"]

    @property
    def command(self) -> str:
        """The command line with these arguments, `--fresh` left out."""
        options = []
        for name in changed_fields(self):
            text, value = f"--{name.replace('_', '-')}", getattr(self, name)
            if name != "fresh":
                options += [text] if value is True else [text, str(value)]
        return shlex.join(["relay-hf", "demo", *options])

    @property
    def model_folder(self) -> Path:
        """Where the relay model is saved."""
        return Path(self.output_dir) / f"relay-sudoku-{self.size}x{self.size}"


@dataclass
class WebArguments:
    """Arguments of the page, which shows a model instead of training one."""

    web: bool = option(
        False, "Train nothing: open a page on the model that the demo has saved (see --size, --output-dir)."
    )
    model: str | None = option(None, "With --web: another relay model, a folder or a repository of the Hub.")
    host: str = option("127.0.0.1", "With --web: address to listen on.")
    port: int = option(7860, "With --web: port to listen on.")

    def __post_init__(self) -> None:
        if not self.web and (given := changed_fields(self)):
            raise ValueError(f"`--{given[0]}` is for the page: also give `--web`, or leave it out.")
        if not 0 < self.port < 65536:
            raise ValueError(f"`--port={self.port}` must be between 1 and 65535.")


def changed_fields(arguments: Any) -> list[str]:
    """Names of a dataclass's fields that differ from their defaults."""
    return [field.name for field in fields(arguments) if getattr(arguments, field.name) != field.default]
