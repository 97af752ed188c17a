"""Where data sets are read: `SFTTrainer` prepares them, each is checked before and after."""

from typing import Any

from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from trl import SFTConfig, SFTTrainer

from ...modeling import RelayConfig
from .checks import check_prepared, check_rows, read_source, warn_of_dropped_rows

# What `SFTTrainer` calls a data set -> what messages call it; of evaluation sets in a dictionary, the key.
NAMES = {"train": "training set"}


def check_sources(args: SFTConfig, others: dict[str, Any]) -> None:
    """Looks at the first rows of all data sets, which `SFTTrainer` needs before it prepares them.

    Args:
        args: training arguments.
        others: the other arguments of `SFTTrainer`.

    Raises:
        ValueError: those of `read_source`.
    """
    evaluated = others.get("eval_dataset")
    named = evaluated if isinstance(evaluated, dict) else {} if evaluated is None else {"eval": evaluated}
    sources = {"training set": others.get("train_dataset"), **{_name(key): value for key, value in named.items()}}
    for name, dataset in sources.items():
        read_source(dataset, name, args, others.get("processing_class"), others.get("formatting_func"))


class DataCheckingTrainer(SFTTrainer):
    """Checks the rows of all data sets, whether they come with the trainer or with a call of `evaluate`.

    The one method that all data sets pass has an underscore; `tests/trainers/test_bad_input.py` fails if it moves.
    """

    relay_config: RelayConfig

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        name = _name(dataset_name)
        reader = read_source(dataset, name, args, processing_class, formatting_func)
        read = dataset if reader is None else check_rows(dataset, reader)
        try:
            prepared = super()._prepare_dataset(read, processing_class, args, packing, formatting_func, dataset_name)
        except TemplateError as error:
            raise ValueError(
                f"The chat template refuses a row of the {name} ({error}): change the row, or give another template."
            ) from error
        checked = check_prepared(prepared, name, self.relay_config)
        warn_of_dropped_rows(dataset, prepared, name)
        return checked


def _name(key: str) -> str:
    return NAMES.get(key, f"data set `{key}`")
