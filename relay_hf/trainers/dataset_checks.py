"""Refuses data that cannot be learned from, before work starts; streams can only be checked batch by batch."""

from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers.utils import logging
from trl import SFTConfig, is_conversational

from ..modeling import RelayConfig

logger = logging.get_logger(__name__)


def check_source(dataset: Any, name: str, args: SFTConfig, others: dict[str, Any]) -> None:
    """Looks at the first row of a data set as it was given: `SFTTrainer` would fail on it without saying why.

    Args:
        dataset: as the user passed it.
        name: what the messages call it.
        args: training arguments.
        others: the other arguments of `SFTTrainer`.

    Raises:
        ValueError: there is no row, no column holds text, or the tokenizer cannot mark where a text ends.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        return
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"The {name} has no rows: check where it is loaded from and what was filtered out.")
    is_prepared = isinstance(args.dataset_kwargs, dict) and args.dataset_kwargs.get("skip_prepare_dataset")
    if "input_ids" in row or is_prepared:
        return
    text_columns = {"messages", "conversations", args.dataset_text_field}
    has_text = "completion" in row if "prompt" in row else not text_columns.isdisjoint(row)
    if not has_text and others.get("formatting_func") is None:
        raise ValueError(
            f"The {name} has the columns {sorted(row)}, which do not tell what to learn: give `prompt` and "
            f"`completion`, `messages`, `{args.dataset_text_field}` (named by `dataset_text_field`), or `input_ids` "
            "and `labels`."
        )
    is_unmarked = getattr(others.get("processing_class"), "eos_token", "") is None and args.eos_token is None
    if is_unmarked and not is_conversational(row):
        raise ValueError(
            f"The tokenizer has no `eos_token` to end the texts of the {name} with: set `tokenizer.eos_token`, or name "
            "one of its tokens in `eos_token` of the training arguments."
        )


def check_dataset(dataset: Any, name: str, config: RelayConfig) -> None:
    """Looks at every row of a data set whose columns `input_ids` and `labels` are lists; a stream must have one row.

    Args:
        dataset: as prepared by `SFTTrainer`; anything but a data set passes.
        name: what the messages call it.
        config: the model's configuration.

    Raises:
        ValueError: a row has no label, a label differs from the token at its position or is [MASK], a token is not in
            the model's vocabulary, or nothing of a stream is left.
    """
    if isinstance(dataset, IterableDataset) and next(iter(dataset), None) is None:
        # The Trainer would end before its first step and call that a success.
        raise ValueError(
            f"No row of the {name} is left to learn from: check that each row has a response and that `max_length` "
            "leaves room for it."
        )
    if not isinstance(dataset, Dataset) or not {"input_ids", "labels"} <= set(dataset.column_names):
        return
    unlabelled: list[int] = []
    seen = 0
    for batch in dataset.with_format("arrow").iter(10_000):
        (labels, row), (tokens, _) = _flat(batch["labels"]), _flat(batch["input_ids"])
        learned = labels != -100
        check_labels(tokens, labels, learned, name, config.mask_token_id)
        # Inside a GPU this would end the process without a word about data.
        outside = tokens[(tokens < 0) | (tokens >= config.text_config.vocab_size)]
        if len(outside):
            raise ValueError(
                f"The {name} has the token id {outside[0]}, but the model has {config.text_config.vocab_size} tokens: "
                "tokenize with the model's own tokenizer, or call `model.resize_token_embeddings`."
            )
        unlabelled += (seen + np.setdiff1d(np.arange(len(batch)), row[learned])).tolist()
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


def check_labels(tokens: Any, labels: Any, learned: Any, name: str, mask_token_id: int) -> None:
    """The same for arrays or tensors of one shape; `learned` marks the labels that are not -100.

    Raises:
        ValueError: a label differs from the token at its position, or is [MASK].
    """
    if tokens.shape != labels.shape or bool((learned & (tokens != labels)).any()):
        raise ValueError(
            f"Labels of the {name} differ from the `input_ids` at their positions: give the clean text as `input_ids`, "
            "the same as `labels`, and -100 where nothing is learned; masks are put in by the trainer."
        )
    if bool((learned & (tokens == mask_token_id)).any()):
        raise ValueError(
            f"The {name} has the mask token (id {mask_token_id}) among what is to be learned, which could never be "
            "revealed: use a token of its own as [MASK], and remove it from the text."
        )


def _flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """All values of an Arrow column of lists, and the row of each."""
    lists = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    return lists.flatten().to_numpy(zero_copy_only=False), lists.value_parent_indices().to_numpy()
