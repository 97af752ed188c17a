"""The options of `relay-hf train`: from a recipe and the command line, and their help."""

import math
import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml
from transformers import TrainingArguments
from transformers.utils import is_bitsandbytes_available
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser
from trl.scripts.utils import DatasetConfig

from ..loading.gguf_sources import refuse_gguf
from ..recipes import recipe_path
from ..startup.one_line import one_line
from ..startup.options import option
from ..trainers import RelayTrainerConfig
from .parser import unknown_option

# TRL's options about weights of 4 bits.
OF_4_BITS = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")


@dataclass
class RelayModelConfig(ModelConfig):
    """TRL's arguments about the model and LoRA, and those of a relay model, which are by default the checkpoint's own.

    Everything else that `RelayConfig` takes goes into `model_init_kwargs`.
    """

    mask_token_id: int | None = option(None, "Id of [MASK]; `relay-hf convert` adds one.")
    block_size: int | None = option(None, "Positions denoised together; 0: the whole sequence.")
    token_shift: bool | None = option(None, "Whether the raw head scores the next token.")
    relay_channel: str | None = option(None, "Channel: what is carried between two steps, e.g. layer_norm, or none.")
    reference_model: str | None = option(None, "Frozen model whose predictions `objective=residual_context` feeds.")
    save_merged: bool = option(True, "With LoRA: also save the whole model, in `merged` inside the output.")
    dry_run: bool = option(False, "Say what would be trained, time two steps, and write nothing.")
    overwrite_output_dir: bool = option(False, "Replace the model and the checkpoints that are in the output.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name_or_path is None:
            raise ValueError("There is no model to train: give `--model_name_or_path`.")
        for source in filter(None, (self.model_name_or_path, self.reference_model)):
            refuse_gguf(source)
        names: Any = self.lora_target_modules
        if isinstance(names, str) and re.fullmatch(r"[\w.]+", names):
            # TRL makes a text of a list of one, which PEFT takes for a pattern of whole paths.
            self.lora_target_modules = [names]
        self._check_quantisation()
        if self.block_size is not None and self.block_size < 0:
            raise ValueError(f"`block_size={self.block_size}` must be at least 1, or 0 for the whole sequence.")

    @property
    def quantises(self) -> str | None:
        """The option by which the model's weights are quantised when they are loaded."""
        return next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(self, name)), None)

    def _check_quantisation(self) -> None:
        for known in (known for known in fields(ModelConfig) if known.name in OF_4_BITS):
            if not self.load_in_4bit and (value := getattr(self, known.name)) != known.default:
                raise ValueError(
                    f"`{known.name}={value}` has no effect without `load_in_4bit`: add it, or leave it out."
                )
        if self.load_in_4bit and self.dtype in ("auto", None):
            raise ValueError(
                f"`dtype={self.dtype}` does not name what 4-bit weights are computed in: give `bfloat16`, `float16` or "
                "`float32`."
            )
        if self.quantises and not is_bitsandbytes_available():
            raise ValueError(f"`{self.quantises}` needs bitsandbytes: run `pip install bitsandbytes`.")

    def relay_options(self) -> dict[str, Any]:
        """The arguments of `RelayConfig` that were given."""
        names = ("mask_token_id", "block_size", "token_shift", "relay_channel")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {**given, "block_size": None} if self.block_size == 0 else given


ARGUMENTS: Any = (ScriptArguments, RelayTrainerConfig, RelayModelConfig, DatasetMixtureConfig)


class TrainArguments(NamedTuple):
    """What was parsed."""

    data: ScriptArguments
    training: RelayTrainerConfig
    model: RelayModelConfig
    mixture: DatasetMixtureConfig


def parse(program: str, config: str | None, argv: Sequence[str]) -> TrainArguments:
    """Reads the options of a recipe, and those of the command line, which win.

    Args:
        program: the command, as the user typed it.
        config: YAML file, or the name of a recipe that comes with the library.
        argv: the other arguments.

    Raises:
        ValueError: the file cannot be read, an option is unknown, or a value is unfit.
    """
    usage = f"{program} [--config FILE_OR_RECIPE] [--OPTION VALUE ...]   ({program} --help lists them)"
    parser = TrlParser(ARGUMENTS, prog=program, usage=usage, add_help=False, allow_abbrev=False)
    # Before the dataclasses are made, which refuse values.
    if unknown := parser.parse_known_args(argv)[1]:
        raise ValueError(unknown_option(parser, unknown[0], "--help_all"))
    if config is not None:
        path = recipe_path(config)
        _check_recipe(path, parser)
        argv = ["--config", str(path), *argv]
    return TrainArguments(*parser.parse_args_and_config(argv))


def _check_recipe(path: Path, parser: TrlParser) -> None:
    """Raise if a recipe holds a value that TRL would take unchecked, or refuse without naming the file."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"`{path}` is not YAML ({one_line(error)}): give lines of the form `option: value`."
        ) from error
    if not isinstance(options, dict):
        raise ValueError(f"`{path}` holds no options: give lines of the form `option: value`.")
    kinds = {name: str(kind) for source in ARGUMENTS for name, kind in get_type_hints(source).items()}
    for name, value in options.items():
        if name != "env" and name not in kinds:  # TRL sets environment variables by `env`
            raise ValueError(f"{unknown_option(parser, str(name), '--help_all')} (in `{path}`)")
        # argparse turns texts into numbers, and leaves everything else unchanged.
        kind = kinds.get(name, "dict")
        if isinstance(value, list | dict) and not any(text in kind for text in ("list", "dict")):
            raise ValueError(f"`{name}: {value}` in `{path}` is not one value: give a text or a number.")
        is_number = not any(text in kind for text in ("str", "bool", "list", "dict"))
        if is_number and (isinstance(value, bool) or (isinstance(value, float) and "float" not in kind)):
            wanted = "number" if "float" in kind else "whole number"
            raise ValueError(f"`{name}: {value}` in `{path}` is not a {wanted}: give one.")
    _check_mixture(options.get("datasets") or [], path)


def _check_mixture(sources: Any, path: Path) -> None:
    """Raise if TRL would fail on a data set with an exception about its own code."""
    if not isinstance(sources, list) or not all(isinstance(source, dict) and "path" in source for source in sources):
        raise ValueError(
            f"`datasets` in `{path}` is not a list of data sets with a `path`: write "
            "`[{path: json, data_files: a.jsonl}]`, for instance."
        )
    known = {field.name for field in fields(DatasetConfig)}
    if unknown := sorted({str(name) for source in sources for name in source} - known):
        raise ValueError(f"`datasets` in `{path}` does not take {unknown}: a data set has {sorted(known)}.")
    for fraction in (source["fraction"] for source in sources if source.get("fraction") is not None):
        if not isinstance(fraction, int | float) or not 0 < fraction < math.inf:
            raise ValueError(f"`fraction: {fraction}` of a data set in `{path}` is no share: give a number above 0.")


# What most runs set: our own options, and of the nearly two hundred that come from the libraries the usual ones.
USUAL: dict[str, Sequence[str]] = {
    "Relay": [*RelayTrainerConfig.__annotations__],
    "Relay model": [*RelayModelConfig.__annotations__],
    "Model (TRL)": ["model_name_or_path", "model_revision", "dtype", "attn_implementation"],
    "LoRA (TRL)": [
        "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit", "load_in_8bit",
    ],
    "Data (TRL)": [
        "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming",
        "datasets", "test_split_size",
    ],
    "Training (transformers and TRL)": [
        "output_dir", "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps",
        "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "bf16", "gradient_checkpointing",
        "completion_only_loss", "assistant_only_loss", "logging_steps", "save_steps", "eval_strategy", "eval_steps",
        "report_to", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "seed",
    ],
}  # fmt: skip
# What `--help_all` adds.
SOURCES = {
    "More of the data (TRL's DatasetMixtureConfig)": DatasetMixtureConfig,
    "More of the model (TRL's ModelConfig)": ModelConfig,
    "More of training (TRL's SFTConfig)": SFTConfig,
    "More of training (transformers' TrainingArguments)": TrainingArguments,
}


def help_text(program: str, purpose: str, everything: bool) -> str:
    """What `--help` prints: relay_hf's own options first, then the usual ones of the libraries, or all of them."""
    sections = dict(USUAL)
    for title, source in SOURCES.items() if everything else ():
        shown = {name for names in sections.values() for name in names}
        sections[title] = [field.name for field in fields(source) if field.init and field.name not in shown]
    lines = [
        f"usage: {program} [--config FILE_OR_RECIPE] [--OPTION VALUE ...]",
        "",
        purpose,
        "",
        "Options may be in a YAML file (`learning_rate: 5e-6`); those of the command line win. Recipes that",
        f"come with the library: {', '.join(sorted(path.stem for path in recipe_path().glob('*.yaml')))}.",
        "",
        "  --config FILE_OR_RECIPE  YAML file with options",
        "  --help, --help_all       this list, or the whole of it",
    ]
    for title, names in sections.items():
        lines += ["", f"{title}:", *(line for name in names for line in _option_lines(name))]
    return "\n".join(lines)


def _option_lines(name: str) -> list[str]:
    """An option's line: its name, the first sentence of what the library says of it, and the default."""
    source = next(source for source in ARGUMENTS if name in source.__dataclass_fields__)
    option: Field = source.__dataclass_fields__[name]
    text = " ".join(option.metadata.get("help", "").split()).split(". ")[0].rstrip(".")
    default = option.default_factory() if option.default_factory is not MISSING else option.default
    if default not in (None, MISSING, [], {}):
        text += f" [{getattr(default, 'value', default)}]"
    width = max(min(shutil.get_terminal_size().columns, 120), 54)
    head, column = f"  --{name}", " " * 34
    # A name longer than the column gets a line of its own.
    above, first = ([], head.ljust(34)) if len(head) < 33 else ([head], column)
    return [*above, *(textwrap.wrap(text, width, initial_indent=first, subsequent_indent=column) or [first])]
