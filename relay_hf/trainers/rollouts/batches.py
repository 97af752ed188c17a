"""Batches of a data collator, which the user may have written: checked, and cut into rows of text.

Legend: B rows, L positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...modeling import RelayConfig

REVEAL_STEPS = "reveal_steps"  # column of traces in data sets and batches
NO_NUMBER = -1


class TextRow(NamedTuple):
    """One text, without padding.

    Attributes:
        ids: (L,) tokens.
        learned: (L,) bool, which of them are learned.
        reveal_steps: (L,) long, as in `RolloutRows`; None = the text has no trace.
    """

    ids: Tensor
    learned: Tensor
    reveal_steps: Tensor | None = None


NumberedRow = tuple[int, TextRow]  # the number says which row of the data it is; `NO_NUMBER` = it is not counted


def read_batch(batch: dict[str, Tensor], config: RelayConfig) -> list[TextRow]:
    """Checks a batch and returns its rows, in main memory, where the trainer leaves batches.

    Args:
        batch: `input_ids` (B, L), `labels` (B, L) with -100 outside the response, and optionally `attention_mask` and
            `reveal_steps` (B, L).
        config: configuration of the model.

    Raises:
        ValueError: there are no labels, or tensors that are not read; all labels are -100, one is at padding, differs
            from the token at its position or is [MASK], a token is not in the vocabulary, or the padding is not on the
            right.
    """
    # A loader that deals batches out to processes sends them to the device.
    batch = {name: tensor.cpu() for name, tensor in batch.items()}
    ids, labels = batch["input_ids"], batch.get("labels")
    if labels is None:
        raise ValueError("The batch has no `labels`: mark what to learn, with -100 everywhere else.")
    if unread := sorted(batch.keys() - {"input_ids", "labels", "attention_mask", REVEAL_STEPS}):
        raise ValueError(f"The batch has {unread}, which the rollout does not read: leave them out in `data_collator`.")
    is_text = batch.get("attention_mask", torch.ones_like(ids)).bool()
    if not ids.shape == labels.shape == is_text.shape:
        raise ValueError(
            f"The batch has `input_ids` of shape {tuple(ids.shape)}, `labels` of {tuple(labels.shape)} and an "
            f"`attention_mask` of {tuple(is_text.shape)}: give three of one shape."
        )
    _check_values(ids, labels, is_text, config)
    return cut_padding(is_text, ids, labels != -100, batch.get(REVEAL_STEPS))


def number_rows(batch: dict[str, Tensor], config: RelayConfig, numbers: Sequence[int]) -> list[NumberedRow]:
    """The rows of a batch with their numbers, without those that have nothing to learn.

    Args:
        batch, config: as in `read_batch`.
        numbers: one for each row that the collator was given.

    Raises:
        ValueError: `read_batch` refuses the batch, or the collator made more or fewer rows of those it was given.
    """
    rows = read_batch(batch, config)
    if len(rows) != len(numbers):
        raise ValueError(
            f"`data_collator` made {len(rows)} rows of {len(numbers)}, so that it cannot be counted which of them were "
            "trained: make one of each, or set `rows_on_demand=False`."
        )
    return [(number, row) for number, row in zip(numbers, rows, strict=True) if row.learned.any()]


def cut_padding(is_text: Tensor, ids: Tensor, learned: Tensor, reveal_steps: Tensor | None = None) -> list[TextRow]:
    """The rows of (B, L) tensors in main memory, without the positions at which `is_text` is False."""
    tensors = [tensor.cpu() for tensor in (ids, learned, reveal_steps) if tensor is not None]
    return [TextRow(*(tensor[row][seen] for tensor in tensors)) for row, seen in enumerate(is_text.cpu())]


def _check_values(ids: Tensor, labels: Tensor, is_text: Tensor, config: RelayConfig) -> None:
    learned, outside = labels != -100, (ids < 0) | (ids >= config.text_config.vocab_size)
    found = (
        ~learned.any(),
        ~is_text[:, 0].all(),
        (is_text[:, 1:] & ~is_text[:, :-1]).any(),
        (learned & ~is_text).any(),
        outside.any(),
        (learned & (ids != labels)).any(),
        (learned & (ids == config.mask_token_id)).any(),
    )
    if not any(found):
        return
    unknown = int(ids[outside][0]) if found[4] else -1
    messages = (
        "All labels of the batch are -100, so there is nothing to learn: check the response of each row.",
        "The batch is padded on the left: blocks are counted from the first column; pad on the right.",
        "The batch has padding between tokens: the zeros of `attention_mask` must be on the right.",
        "The batch has labels at padding: give -100 where `attention_mask` is 0.",
        token_is_unknown("The batch", unknown, config),
        labels_differ("The batch"),
        mask_is_learned("The batch", config),
    )
    raise ValueError(next(message for message, is_so in zip(messages, found, strict=True) if is_so))


def token_is_unknown(where: str, token_id: int, config: RelayConfig) -> str:
    """The message about a token outside the vocabulary; `where` is the subject of the sentence."""
    return (
        f"{where} has the token id {token_id}, but the model has {config.text_config.vocab_size} tokens: tokenize with "
        "the model's own tokenizer, or call `model.resize_token_embeddings`."
    )


def labels_differ(where: str) -> str:
    """The message about labels that differ from the tokens at their positions."""
    return (
        f"{where} has labels that differ from the `input_ids` at their positions: give the clean text as `input_ids`, "
        "the same as `labels`, and -100 where nothing is learned; masks are put in by the trainer."
    )


def mask_is_learned(where: str, config: RelayConfig) -> str:
    """The message about a [MASK] that has a label."""
    return (
        f"{where} has the mask token (id {config.mask_token_id}) among what is to be learned, which could never be "
        "revealed: use a token of its own as [MASK], and remove it from the text."
    )
