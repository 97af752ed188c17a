"""Checks of data sets: of all rows before work starts, of a stream's rows as they come."""

from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ...modeling import RelayConfig
from ..relay_config import RelayTrainerConfig
from ..rollouts.batches import labels_differ, mask_is_learned, token_is_unknown
from .text_rows import TextRows, text_rows
from .token_rows import FOREIGN, TokenRows
from .traces import check_has_traces

logger = logging.get_logger(__name__)


def read_source(
    dataset: Any, name: str, args: RelayTrainerConfig, tokenizer: Any, formatting_func: Any = None
) -> TextRows | TokenRows | None:
    """Looks at the first row of a data set as it was given, and says what all of them must look like.

    Args:
        dataset: as the user passed it.
        name: what the messages call it.
        args: training arguments.
        tokenizer: whose end of text and chat template are used.
        formatting_func: that of `SFTTrainer`, which makes text of a row.

    Returns:
        What `check_rows` takes; None if rows are not read by us, but by a function of the user.

    Raises:
        ValueError: it is no data set, there is no row, no column holds text, or the tokenizer cannot mark where a text
            ends.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        splits = f" with the splits {sorted(map(str, dataset))}" if isinstance(dataset, dict) else ""
        raise ValueError(
            f"The {name} is a {type(dataset).__name__}{splits}: give one `Dataset` or `IterableDataset` of the package "
            "datasets, which `Dataset.from_list` makes of a list of rows."
        )
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"The {name} has no rows: check where it is loaded from and what was filtered out.")
    if args.recipe.follows_traces:
        check_has_traces(row, name, args.objective)
    if isinstance(args.dataset_kwargs, dict) and args.dataset_kwargs.get("skip_prepare_dataset"):
        return None
    if foreign := sorted(row.keys() & set(FOREIGN)):
        raise ValueError(f"The {name} has the columns {foreign}, which the model does not read: remove them.")
    if "input_ids" in row:
        if args.completion_only_loss and not row.keys() & {"labels", "completion_mask"}:
            raise ValueError(_without_completion(name, "`completion_mask`"))
        longest = args.max_length if args.recipe.follows_traces else None
        return TokenRows(name, tuple(row), args.completion_only_loss is False, args.recipe.follows_traces, longest)
    if formatting_func is not None:
        return None
    template = getattr(tokenizer, "chat_template", None)
    reader = text_rows(row, name, args.dataset_text_field, template, args.assistant_only_loss)
    if args.completion_only_loss and "completion" not in reader.columns:
        raise ValueError(_without_completion(name, "`prompt` and `completion`"))
    if getattr(tokenizer, "eos_token", "") is None and args.eos_token is None and not reader.is_talk:
        raise ValueError(
            f"The tokenizer has no `eos_token` to end the texts of the {name} with: set `tokenizer.eos_token`, or name "
            "one of its tokens in `eos_token` of the training arguments."
        )
    reader(row, 0)  # `SFTTrainer` looks at it, too
    return reader


def check_rows(dataset: Any, reader: TextRows | TokenRows) -> Any:
    """Reads every row of a data set as it was given: at once, or as it comes.

    Args:
        dataset: as the user passed it.
        reader: of `read_source`.

    Returns:
        The data set, with columns of tokens folded into `input_ids` and `labels`.

    Raises:
        ValueError: a row is not as it must be.
    """
    folded = reader.folded if isinstance(reader, TokenRows) else []
    if isinstance(dataset, IterableDataset):
        features = None if folded else dataset.features
        return dataset.map(reader, with_indices=True, remove_columns=folded, features=features)
    rows = dataset.with_format(None)
    if folded:
        return rows.map(reader, with_indices=True, remove_columns=folded, desc="Reading columns of tokens")
    for index, row in enumerate(rows):
        reader(row, index)
    return dataset


def check_prepared(dataset: Any, name: str, config: RelayConfig) -> Any:
    """Looks at every row of a data set whose columns `input_ids` and `labels` are lists: at once, or as it comes.

    Args:
        dataset: as prepared by `SFTTrainer`.
        name: what the messages call it.
        config: the model's configuration.

    Returns:
        The data set.

    Raises:
        ValueError: a row has no label, a label differs from the token at its position or is [MASK], a token is not in
            the model's vocabulary, or nothing of a stream is left.
    """
    if isinstance(dataset, IterableDataset):
        if next(iter(dataset), None) is None:
            # The Trainer would end before its first step and call that a success.
            raise ValueError(
                f"No row of the {name} is left to learn from: check that each row has a response and that `max_length` "
                "leaves room for it."
            )
        check = partial(_check_row, name=name, config=config)
        return dataset.map(check, with_indices=True, features=dataset.features)
    if not {"input_ids", "labels"} <= set(dataset.column_names):
        return dataset
    unlabelled: list[int] = []
    seen = 0
    for batch in dataset.with_format("arrow").iter(10_000):
        (labels, row), (tokens, _) = _flat(batch["labels"]), _flat(batch["input_ids"])
        _check_tokens(tokens, labels, seen + row, name, config)
        unlabelled += (seen + np.setdiff1d(np.arange(len(batch)), row[labels != -100])).tolist()
        seen += len(batch)
    if len(unlabelled) == seen:  # or none was left: `SFTTrainer` drops rows whose labels `max_length` cut off
        raise ValueError(
            f"All labels of the {name} are -100, so there is nothing to learn: check that each row has a response and "
            "that `max_length` leaves room for it."
        )
    if unlabelled:
        raise ValueError(
            f"{len(unlabelled)} of {seen} rows of the {name} have no label but -100, the first of them row "
            f"{unlabelled[0]}, so there is nothing to learn from them: remove them."
        )
    return dataset


def warn_of_dropped_rows(given: Any, prepared: Any, name: str) -> None:
    """Says how many rows `SFTTrainer` left out, which it does without a word.

    Args:
        given: the data set as the user passed it.
        prepared: what became of it; streams are not counted.
        name: what the message calls it.
    """
    if isinstance(given, Dataset) and isinstance(prepared, Dataset) and len(prepared) < len(given):
        dropped = len(given) - len(prepared)
        logger.warning(
            f"{dropped} of {len(given)} rows of the {name} are left out: `max_length` leaves no room for a response."
        )


def _check_row(row: dict[str, Any], index: int, name: str, config: RelayConfig) -> dict[str, Any]:
    """A prepared row of a stream, unchanged."""
    if {"input_ids", "labels"} <= row.keys():
        tokens, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
        _check_tokens(tokens, labels, np.full(len(labels), index), name, config)
    return row


def _check_tokens(tokens: np.ndarray, labels: np.ndarray, rows: np.ndarray, name: str, config: RelayConfig) -> None:
    """Raise if a row cannot be learned from; `rows` has the number of the row of each label."""
    if tokens.shape != labels.shape:
        raise ValueError(labels_differ(f"The {name}"))
    outside, learned = (tokens < 0) | (tokens >= config.text_config.vocab_size), labels != -100
    for wrong, message in (
        # Inside a GPU this would end the process without a word about data.
        (outside, lambda where: token_is_unknown(where, tokens[outside][0], config)),
        (learned & (tokens != labels), labels_differ),
        (learned & (tokens == config.mask_token_id), lambda where: mask_is_learned(where, config)),
    ):
        if wrong.any():
            raise ValueError(message(f"Row {rows[wrong][0]} of the {name}"))


def _without_completion(name: str, columns: str) -> str:
    return f"`completion_only_loss=True` has no effect on the {name} without {columns}: give them, or leave it out."


def _flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """All values of an Arrow column of lists, and the row of each."""
    lists = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    return lists.flatten().to_numpy(zero_copy_only=False), lists.value_parent_indices().to_numpy()
