"""What can be chosen on the command line of `relay-hf demo`."""

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass
class DemoArguments:
    """Arguments of the demo; the defaults fit two CPU cores and ten minutes, installation included."""

    size: int = field(default=6, metadata={"help": "Board size: 4, 6 or 9."})
    steps: int = field(default=150, metadata={"help": "Adaptation steps of every objective."})
    warmup_steps: int = field(
        default=900, metadata={"help": "`masked` steps from scratch that all objectives start from."}
    )
    seeds: int = field(default=1, metadata={"help": "Repeat everything with this many training seeds."})
    full: bool = field(default=False, metadata={"help": "Also adapt with `relay_sg`, the state without its gradient."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "CSV file or Hub id with columns `question` and `answer`, instead of the generator."},
    )
    puzzles: int = field(default=4000, metadata={"help": "Training puzzles, each shown under ever new symmetries."})
    extra_clues: int = field(default=4, metadata={"help": "Clues given beyond those of a minimal puzzle."})
    test_puzzles: int = field(
        default=500, metadata={"help": "Held-out puzzles; none is a symmetric twin of a training one."}
    )
    batch_size: int = field(default=256, metadata={"help": "Puzzles per training step."})
    hidden_size: int = field(default=96, metadata={"help": "Width of the model."})
    layers: int = field(default=3, metadata={"help": "Layers of the model."})
    minutes: float | None = field(
        default=None,
        metadata={
            "help": "Use smaller batches and fewer steps if training would take longer than this. By default ten "
            "minutes, or as long as it takes if any size was chosen."
        },
    )
    fresh: bool = field(default=False, metadata={"help": "Start anew instead of going on with what is unfinished."})
    output_dir: str = field(default="runs/demo", metadata={"help": "Where results, picture and model are written."})

    def __post_init__(self) -> None:
        for name in ("steps", "warmup_steps", "seeds", "puzzles", "test_puzzles", "batch_size", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}={getattr(self, name)}` must be at least 1.")
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
            option, value = f"--{name.replace('_', '-')}", getattr(self, name)
            if name != "fresh":
                options += [option] if value is True else [option, str(value)]
        return shlex.join(["relay-hf", "demo", *options])

    @property
    def model_folder(self) -> Path:
        """Where the relay model is saved."""
        return Path(self.output_dir) / f"relay-sudoku-{self.size}x{self.size}"


@dataclass
class WebArguments:
    """Arguments of the page, which shows a model instead of training one."""

    web: bool = field(
        default=False,
        metadata={
            "help": "Train nothing: open a page on the model that the demo has saved (see --size, --output-dir)."
        },
    )
    model: str | None = field(
        default=None, metadata={"help": "With --web: another relay model, a folder or a repository of the Hub."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "With --web: address to listen on."})
    port: int = field(default=7860, metadata={"help": "With --web: port to listen on."})

    def __post_init__(self) -> None:
        if not self.web and (given := changed_fields(self)):
            raise ValueError(f"`--{given[0]}` is for the page: also give `--web`, or leave it out.")
        if not 0 < self.port < 65536:
            raise ValueError(f"`--port={self.port}` must be between 1 and 65535.")


def changed_fields(arguments: Any) -> list[str]:
    """Names of a dataclass's fields that differ from their defaults."""
    return [option.name for option in fields(arguments) if getattr(arguments, option.name) != option.default]
