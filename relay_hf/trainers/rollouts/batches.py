"""Batches of a data collator, which may be the user's: checked, and with labels turned into what is learned.

Legend: B rows, L positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, stack
from torch.nn.utils.rnn import pad_sequence

from ...modeling import RelayConfig

TextRow = tuple[Tensor, Tensor]  # (L,) ids and (L,) bool, which of them are learned


class TextBatch(NamedTuple):
    """Rows of text, padded on the right.

    Args:
        ids: (B, L) the text.
        learned: (B, L) bool, positions that are learned; the others are always visible.
        is_text: (B, L) bool, False at padding.
    """

    ids: Tensor
    learned: Tensor
    is_text: Tensor

    @classmethod
    def of_rows(cls, rows: Sequence[TextRow], device: torch.device) -> "TextBatch":
        """Pads the rows to the longest of them."""
        ids, learned = (pad_sequence(list(column), batch_first=True) for column in zip(*rows, strict=True))
        lengths = torch.tensor([len(row) for row, _ in rows])
        is_text = torch.arange(ids.shape[1]) < lengths[:, None]
        return cls(ids.to(device), learned.to(device), is_text.to(device))

    def rows(self) -> list[TextRow]:
        """The rows that have something to learn, in main memory and without padding."""
        ids, learned, is_text = (tensor.cpu() for tensor in self)
        kept = learned.any(-1).nonzero()[:, 0].tolist()
        return [(ids[row, is_text[row]], learned[row, is_text[row]]) for row in kept]


def read_batch(batch: dict[str, Tensor], config: RelayConfig) -> TextBatch:
    """Checks a batch and reads it.

    Args:
        batch: `input_ids` (B, L), `labels` (B, L) with -100 outside the response, `attention_mask` (B, L) or nothing.
        config: the model's configuration.

    Raises:
        ValueError: there are no labels, or tensors that are not read; all labels are -100, one is at padding, differs
            from the token at its position or is [MASK], a token is not in the vocabulary, or the padding is not on the
            right.
    """
    ids, labels = batch["input_ids"], batch.get("labels")
    if labels is None:
        raise ValueError("The batch has no `labels`: mark what to learn, with -100 everywhere else.")
    if unread := sorted(batch.keys() - {"input_ids", "labels", "attention_mask"}):
        raise ValueError(f"The batch has {unread}, which the rollout does not read: leave them out in `data_collator`.")
    text = TextBatch(ids, labels != -100, batch.get("attention_mask", torch.ones_like(ids)).bool())
    if not ids.shape == labels.shape == text.is_text.shape:
        raise ValueError(
            f"The batch has `input_ids` of shape {tuple(ids.shape)}, `labels` of {tuple(labels.shape)} and an "
            f"`attention_mask` of {tuple(text.is_text.shape)}: give three of one shape."
        )
    _check_values(text, labels, config)
    return text


def _check_values(text: TextBatch, labels: Tensor, config: RelayConfig) -> None:
    ids, learned, is_text = text
    outside = (ids < 0) | (ids >= config.text_config.vocab_size)
    found = (
        ~learned.any(),
        ~is_text[:, 0].all(),
        (is_text[:, 1:] & ~is_text[:, :-1]).any(),
        (learned & ~is_text).any(),
        outside.any(),
        (learned & (ids != labels)).any(),
        (learned & (ids == config.mask_token_id)).any(),
    )
    # One answer for all, since an accelerator is waited for each time.
    if not stack(found).any():
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
    """The message about a token outside the vocabulary; `where` starts the sentence, as in the two below."""
    return (
        f"{where} has the token id {token_id}, but the model has {config.text_config.vocab_size} tokens: tokenize with "
        "the model's own tokenizer, or call `model.resize_token_embeddings`."
    )


def labels_differ(where: str) -> str:
    """The message about labels that are not the tokens at their positions."""
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
