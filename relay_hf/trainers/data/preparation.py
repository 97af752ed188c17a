"""Prepares data sets with `SFTTrainer`, checks each one before and after, and leaves batches in main memory."""

from typing import Any

from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from torch.utils.data import DataLoader
from trl import SFTTrainer

from ...modeling import RelayConfig
from ..relay_config import RelayTrainerConfig
from .checks import check_prepared, check_rows, read_source, warn_of_dropped_rows


def check_sources(args: RelayTrainerConfig, others: dict[str, Any]) -> None:
    """Checks the first row of each data set, because `SFTTrainer` reads it before it prepares the data set.

    Args:
        args: training arguments.
        others: the other arguments of `SFTTrainer`.

    Raises:
        ValueError: `read_source` refuses a data set.
    """
    evaluated = others.get("eval_dataset")
    named = evaluated if isinstance(evaluated, dict) else {} if evaluated is None else {"eval": evaluated}
    for key, dataset in {"train": others.get("train_dataset"), **named}.items():
        read_source(dataset, _name(key), args, others.get("processing_class"), others.get("formatting_func"))


class DataCheckingTrainer(SFTTrainer):
    """Checks the rows of all data sets, whether they come with the trainer or with a call of `evaluate`.

    Batches stay in main memory, where they are checked and cut into rows; only rows in work go to the device.

    The only method that all data sets pass through is private; `tests/trainers/test_bad_input.py` fails if it moves.
    """

    relay_config: RelayConfig

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        name = _name(dataset_name)
        reader = read_source(dataset, name, args, processing_class, formatting_func)
        read = dataset if reader is None else check_rows(dataset, reader)
        try:
            # Texts stay apart here, and lie side by side only while the model runs: TRL would join their tokens.
            prepared = super()._prepare_dataset(read, processing_class, args, False, formatting_func, dataset_name)
        except TemplateError as error:
            raise ValueError(
                f"The chat template refuses a row of the {name} ({error}): change the row, or give another template."
            ) from error
        checked = check_prepared(prepared, name, self.relay_config)
        warn_of_dropped_rows(dataset, prepared, name)
        return checked

    def get_train_dataloader(self) -> DataLoader:
        """As in SFTTrainer, but batches stay in main memory."""
        return _in_main_memory(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in SFTTrainer, but batches stay in main memory."""
        return _in_main_memory(super().get_eval_dataloader(eval_dataset))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs  # the Trainer sends them to the device, and has no public hook that would keep it from that


def _in_main_memory(loader: DataLoader) -> DataLoader:
    """Keeps accelerate from sending batches to the device; only where it deals them out to processes, it has to."""
    if getattr(loader, "device", None) is not None:
        loader.device = None
    return loader


def _name(key: str) -> str:
    """What messages call a data set; `key` is what `SFTTrainer` calls it, or the key of an evaluation set."""
    return "training set" if key == "train" else f"data set `{key}`"
