"""Rows that were tokenised beforehand: columns that say which tokens count become `input_ids` and `labels`."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..rollouts.batches import REVEAL_STEPS
from .text_rows import shown

# What a tokenizer or a packing adds to `input_ids`. `SFTTrainer` reads none of the first three.
MASKS = ("completion_mask", "assistant_masks")
FOLDED = ("attention_mask", "position_ids", "seq_lengths", *MASKS)
# Inputs of other models, which nothing here reads.
FOREIGN = ("inputs_embeds", "pixel_values", "image", "images", "videos", "audio", "input_features", "cu_seq_lens_q")


@dataclass(frozen=True)
class TokenRows:
    """Makes rows of `input_ids` and `labels`.

    Padding is cut off on either side, positions must count from 0, and what a mask leaves out has no label.

    Args:
        name: what messages call the data set.
        columns: those of the first row; every row has the same.
        learns_prompts: whether `completion_mask` is to be ignored.
        has_traces: whether `reveal_steps` are read.
        longest: number of tokens that a row may have; None = any.
    """

    name: str
    columns: tuple[str, ...]
    learns_prompts: bool
    has_traces: bool = False
    longest: int | None = None

    @property
    def folded(self) -> list[str]:
        """The columns that become part of `input_ids` and `labels`."""
        return [column for column in FOLDED if column in self.columns]

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """The row with `input_ids` and, if the row has other columns of tokens, `labels`.

        Raises:
            ValueError: a column does not hold a whole number for each token, or contradicts another.
        """
        where = f"Row {index} of the {self.name}"
        of_traces = [REVEAL_STEPS] if self.has_traces else []
        tokens = {
            column: _whole_numbers(row.get(column), where, column)
            for column in ("input_ids", "labels", *of_traces, *FOLDED)
            if column in self.columns or column == "input_ids"
        }
        lengths = tokens.pop("seq_lengths", None)
        for column, values in tokens.items():
            if len(values) != len(tokens["input_ids"]):
                raise ValueError(
                    f"{where} has {len(values)} numbers in `{column}` for {len(tokens['input_ids'])} `input_ids`: give "
                    "one for each token."
                )
        if self.has_traces:
            self._check_trace(tokens, where)
        if not self.folded:
            return row
        tokens = self._without_padding(tokens, where)
        ids, positions = tokens["input_ids"], tokens.get("position_ids")
        if positions is not None and not np.array_equal(positions, np.arange(len(ids))):
            raise ValueError(
                f"{where} has `position_ids` that do not count its tokens from 0, as in packed rows: give one text a "
                "row, and leave the column out."
            )
        if lengths is not None and len(lengths) != 1:
            raise ValueError(
                f"{where} holds {len(lengths)} texts by its `seq_lengths`, but the relay state would cross them: give "
                "one text a row, and leave the column out."
            )
        others = {column: value for column, value in row.items() if column not in self.folded}
        labels, steps = self._labels(tokens, where), {name: tokens[name].tolist() for name in of_traces}
        return {**others, "input_ids": ids.tolist(), "labels": labels.tolist(), **steps}

    def _check_trace(self, tokens: dict[str, np.ndarray], where: str) -> None:
        if bool((tokens[REVEAL_STEPS] < 0).any()):
            raise ValueError(
                f"{where} has the number {tokens[REVEAL_STEPS].min()} in `{REVEAL_STEPS}`, which count from 0: give 0 "
                "where the prompt is."
            )
        if self.longest is not None and len(tokens["input_ids"]) > self.longest:
            raise ValueError(
                f"{where} has {len(tokens['input_ids'])} tokens, and a trace cannot be cut to `max_length="
                f"{self.longest}`: set it to None, or remove the row."
            )

    def _without_padding(self, tokens: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
        if "attention_mask" not in tokens:
            return tokens
        seen = _flags(tokens["attention_mask"], where, "attention_mask").nonzero()[0]
        if len(seen) and seen[-1] - seen[0] >= len(seen):
            raise ValueError(
                f"{where} has zeros of `attention_mask` between tokens: it may only mark padding at either end; remove "
                "what is not to be seen."
            )
        return {column: values[seen] for column, values in tokens.items()}

    def _labels(self, tokens: dict[str, np.ndarray], where: str) -> np.ndarray:
        labels = tokens.get("labels", tokens["input_ids"])
        for column in MASKS:
            if column not in tokens or (column == "completion_mask" and self.learns_prompts):
                continue
            learned = _flags(tokens[column], where, column)
            if "labels" in tokens and bool((labels[~learned] != -100).any()):
                raise ValueError(
                    f"{where} has labels where `{column}` is 0: leave out one of the two columns, or let them agree."
                )
            labels = np.where(learned, labels, -100)
        return labels


def _whole_numbers(values: Any, where: str, column: str) -> np.ndarray:
    try:
        numbers = np.asarray(values if values is not None else [None])
    except ValueError:  # lists of different lengths
        numbers = np.asarray([None])
    if numbers.ndim != 1 or (numbers.dtype.kind not in "iub" and numbers.size):
        raise ValueError(
            f"{where} has {shown(values)} in the column `{column}`, which must hold a list of whole numbers: tokenize "
            "the text, or remove the row."
        )
    return numbers.astype(np.int64)


def _flags(values: np.ndarray, where: str, column: str) -> np.ndarray:
    if bool(((values != 0) & (values != 1)).any()):
        raise ValueError(
            f"{where} has a number in `{column}` that is neither 0 nor 1, as in packed rows: give one text a row."
        )
    return values.astype(bool)
