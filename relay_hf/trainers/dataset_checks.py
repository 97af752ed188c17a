"""Refuses data that cannot be learned from, before work starts; streams can only be checked batch by batch."""

from typing import Any

import numpy as np
from datasets import Dataset


def check_dataset(dataset: Any, name: str, mask_token_id: int) -> None:
    """Looks at every row of a data set whose columns `input_ids` and `labels` are lists; other data sets pass.

    Args:
        dataset: as prepared by `SFTTrainer`.
        name: what the messages call it.
        mask_token_id: of the model.

    Raises:
        ValueError: a row has no label, a label differs from the token at its position, or a label is [MASK].
    """
    if not isinstance(dataset, Dataset) or not {"input_ids", "labels"} <= set(dataset.column_names):
        return
    unlabelled: list[int] = []
    seen = 0
    for batch in dataset.with_format("arrow").iter(10_000):
        (labels, row), (tokens, _) = _flat(batch["labels"]), _flat(batch["input_ids"])
        learned = labels != -100
        check_labels(tokens, labels, learned, name, mask_token_id)
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
