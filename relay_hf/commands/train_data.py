"""The data sets that the options of `relay-hf train` name: on the Hub, in a folder, in files, or a mixture."""

import json
from pathlib import Path
from typing import Any

import pandas
from datasets import Features, Value, load_dataset
from datasets.exceptions import DatasetsError
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from ..hub_cards import is_hub_id
from ..startup.one_line import one_line
from ..trainers import RelayTrainerConfig

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
UNNAMED = "unnamed files"


def load_splits(
    data: ScriptArguments, mixture: DatasetMixtureConfig, training: RelayTrainerConfig
) -> tuple[Any, Any | None]:
    """The rows to train on and, if the training evaluates, those to evaluate on.

    Args:
        data: one data set by name: a Hub id, a folder, or a file of JSON lines, CSV or Parquet.
        mixture: or several, and the part of the rows that is kept for evaluation.
        training: says whether there is an evaluation, and the seed of that part.

    Raises:
        ValueError: the options name no data set, or name it in two ways.
        OSError: a data set cannot be read.
    """
    _check(data, mixture, training)
    evaluates = training.eval_strategy != "no"
    mixed = DatasetMixtureConfig(datasets=mixture.datasets, streaming=mixture.streaming)
    try:
        train = get_dataset(mixed)["train"] if mixture.datasets else load_rows(data, data.dataset_train_split)
        if mixture.test_split_size is None:
            return train, load_rows(data, data.dataset_test_split) if evaluates else None
    except DatasetsError as error:
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"The data set cannot be read ({reason}): check its files.") from error
    # TRL would split without a seed, so that a resumed run had other rows.
    parts = train.train_test_split(test_size=mixture.test_split_size, seed=training.seed)
    return parts["train"], parts["test"] if evaluates else None


def names_for_card(data: ScriptArguments, mixture: DatasetMixtureConfig) -> list[str]:
    """Each data set's name on the Hub, to which the card can link; files keep theirs to themselves."""
    sources = [(source.path, source.data_files) for source in mixture.datasets] or [(str(data.dataset_name), None)]
    names = [
        UNNAMED if _is_file(path) or Path(path).exists() or (files and not is_hub_id(path)) else path
        for path, files in sources
    ]
    return list(dict.fromkeys(names))


def _check(data: ScriptArguments, mixture: DatasetMixtureConfig, training: RelayTrainerConfig) -> None:
    if data.ignore_bias_buffers:
        raise ValueError("`ignore_bias_buffers` has no effect here: leave it out.")
    if bool(data.dataset_name) == bool(mixture.datasets):
        raise ValueError("One of `dataset_name` and `datasets` must name the training data: give the one or the other.")
    if mixture.test_split_size is not None and not 0 < mixture.test_split_size < 1:
        raise ValueError(
            f"`test_split_size={mixture.test_split_size:g}` is no part of the rows: give a number between 0 and 1, or "
            "leave it out to evaluate on a split of its own, or not at all."
        )
    is_streamed = mixture.streaming if mixture.datasets else data.dataset_streaming
    if mixture.test_split_size is not None and is_streamed:
        raise ValueError("`test_split_size` cannot cut a stream in two: leave it out, or load without streaming.")
    has_test = mixture.test_split_size is not None or (data.dataset_name and not _is_file(data.dataset_name))
    if training.eval_strategy != "no" and not has_test:
        raise ValueError(
            f"`eval_strategy={getattr(training.eval_strategy, 'value', training.eval_strategy)}` has no rows to "
            "evaluate on: give `test_split_size`, or a `dataset_name` with a split of its own."
        )


def _is_file(name: str) -> bool:
    return Path(name).suffix in BUILDERS


def load_rows(data: ScriptArguments, split: str) -> Any:
    """A split of one data set, on the Hub, in a folder or in a file.

    Raises:
        ValueError: a file has no rows, or a line that is none.
        OSError: the data set cannot be read.
    """
    name = str(data.dataset_name)
    if not _is_file(name):
        return load_dataset(name, data.dataset_config, split=split, streaming=data.dataset_streaming)
    if not Path(name).is_file():
        raise FileNotFoundError(f"`dataset_name={name}` does not exist: check the path, or give a Hub id.")
    if Path(name).stat().st_size == 0:
        raise ValueError(f"`dataset_name={name}` is empty: give a file with rows.")
    builder = BUILDERS[Path(name).suffix]
    if Path(name).suffix == ".jsonl":
        _check_lines(Path(name))
    as_written = _texts_of(name) if builder == "csv" else {}
    return load_dataset(builder, data_files=name, split=split, streaming=data.dataset_streaming, **as_written)


def _check_lines(path: Path) -> None:
    """Reads a file of JSON lines once: the library numbers lines within a chunk of the file.

    Raises:
        ValueError: a line is no JSON, or holds no names and values.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"Line {number} of `{path}` is no JSON ({error}): correct or remove it.") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"Line {number} of `{path}` holds a {type(row).__name__}, not the columns of a row: write "
                    '`{"prompt": ..., "completion": ...}`, for instance.'
                )


def _texts_of(path: str) -> dict[str, Any]:
    """Options that read cells of a CSV file as written: digits are no number, "None" is a text; only "" is nothing."""
    columns = pandas.read_csv(path, nrows=0).columns
    return {"features": Features(dict.fromkeys(columns, Value("string"))), "keep_default_na": False, "na_values": [""]}
