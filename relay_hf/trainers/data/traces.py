"""Traces of decoding beside the tokens of a data set: checked before work starts, and padded like them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..rollouts.batches import REVEAL_STEPS
from ..rollouts.rows import fit_positions


def check_has_traces(row: dict[str, Any], name: str, objective: str) -> None:
    """Raise if the first row of a data set has no trace.

    Args:
        row: the first row.
        name: what messages call the data set.
        objective: the one that follows traces.

    Raises:
        ValueError: a column is missing.
    """
    if not {"input_ids", REVEAL_STEPS} <= row.keys():
        raise ValueError(
            f"The {name} has the columns {sorted(row)}, but `objective={objective!r}` follows traces: give "
            f"`input_ids`, `labels` and `{REVEAL_STEPS}`, as `relay-hf traces` writes them."
        )


@dataclass(frozen=True)
class TraceCollator:
    """Adds the traces of the rows, with zeros behind them, to the batches of another collator.

    Args:
        collate: makes a batch of rows, padded on the right.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of some rows.

        Raises:
            ValueError: a row's trace has not one number for each token.
        """
        for row in rows:
            if len(row.get(REVEAL_STEPS) or ()) != len(row["input_ids"]):
                raise ValueError(
                    f"A row of {len(row['input_ids'])} `input_ids` has the `{REVEAL_STEPS}` {row.get(REVEAL_STEPS)}: "
                    "give one whole number for each token."
                )
        batch = self.collate(rows)
        steps = pad_sequence([torch.as_tensor(row[REVEAL_STEPS]) for row in rows], batch_first=True)
        return {**batch, REVEAL_STEPS: fit_positions(steps, batch["input_ids"].shape[1])}
