"""The rollout buffer: rows that live across optimizer steps until they are fully revealed."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..modeling import RelayConfig
from .dataset_checks import check_labels
from .rows import RolloutRows


def fresh_rows(config: RelayConfig, batch: dict[str, Tensor], carries_state: bool) -> RolloutRows:
    """Rows in which everything to be learned is masked.

    Args:
        config: the model's configuration.
        batch: `input_ids` (B, L), `labels` (B, L) with -100 outside the response, `attention_mask` (B, L) or nothing.
        carries_state: whether the objective uses the relay channel.

    Raises:
        ValueError: all labels are -100, one differs from the token at its position or is [MASK], or the padding is on
            the left.
    """
    clean_ids = batch["input_ids"]
    if batch.get("labels") is None:
        raise ValueError("The batch has no `labels`: mark what to learn, with -100 everywhere else.")
    maskable = batch["labels"] != -100
    if not bool(maskable.any()):
        raise ValueError(
            "All labels of the batch are -100, so there is nothing to learn: check the response of each row."
        )
    check_labels(clean_ids, batch["labels"], maskable, "batch", config.mask_token_id)
    attention_mask = batch.get("attention_mask", torch.ones_like(clean_ids)).bool()
    if not bool(attention_mask[:, 0].all()):
        raise ValueError("The batch is padded on the left: blocks are counted from the first column; pad on the right.")
    rows, length = clean_ids.shape
    state = None
    if carries_state:
        # Zeros also stand for "no state yet": `has_state` tells the two apart.
        state = torch.zeros(rows, length, config.text_config.hidden_size, device=clean_ids.device)
    return RolloutRows(
        clean_ids=clean_ids,
        maskable=maskable,
        attention_mask=attention_mask,
        noisy_ids=torch.where(maskable, config.mask_token_id, clean_ids),
        relay_state=state,
        has_state=torch.zeros(rows, dtype=torch.bool, device=clean_ids.device),
    )


class RolloutBuffer:
    """A fixed number of rows, each replaced when it is finished.

    Finished rows are overwritten by the first incoming rows, in order; the other incoming rows are dropped, as in the
    published reference. Rows of different length are padded on the right to the longest.

    Args:
        config: the model's configuration.
        carries_state: whether the objective uses the relay channel.
    """

    def __init__(self, config: RelayConfig, carries_state: bool) -> None:
        self.config = config
        self.carries_state = carries_state
        self.rows: RolloutRows | None = None

    def refill(self, batch: dict[str, Tensor]) -> int:
        """Replaces finished rows by fresh ones of `batch`; the first batch sets the number of rows.

        Returns:
            How many rows were replaced.
        """
        incoming = fresh_rows(self.config, batch, self.carries_state)
        if self.rows is None:
            self.rows = incoming
            return len(incoming.clean_ids)
        is_finished = ~self.rows.masked(self.config.mask_token_id).any(-1)
        slots = is_finished.nonzero()[:, 0][: len(incoming.clean_ids)]
        length = max(self.rows.clean_ids.shape[1], incoming.clean_ids.shape[1])
        current, incoming = self.rows.fit(length), incoming.fit(length)
        rows = _map(lambda kept, new: kept.index_copy(0, slots, new[: len(slots)]), current, incoming)
        # Without this the longest row ever seen would set the cost of every later step.
        self.rows = rows.fit(int(rows.attention_mask.sum(-1).max()))
        return len(slots)

    def store(self, rows: RolloutRows) -> None:
        """Keeps the rows as the rollout left them."""
        self.rows = rows

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the rows by name; empty before the first batch."""
        if self.rows is None:
            return {}
        tensors = {field.name: getattr(self.rows, field.name) for field in fields(self.rows)}
        return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: it is of an objective that carries a state where this one does not, or the other way round.
        """
        if state and self.carries_state != ("relay_state" in state):
            raise ValueError(
                "The checkpoint's rollout buffer is of another objective, which this run cannot go on with: load the "
                "checkpoint as a model and start a new run, or delete its `rollout_buffer_*.safetensors`."
            )
        self.rows = RolloutRows(**{f.name: state.get(f.name) for f in fields(RolloutRows)}) if state else None


def _map(function: Any, first: RolloutRows, second: RolloutRows) -> RolloutRows:
    """Applies `function` to each pair of tensors."""
    pairs = {field.name: (getattr(first, field.name), getattr(second, field.name)) for field in fields(first)}
    return RolloutRows(**{name: None if a is None else function(a, b) for name, (a, b) in pairs.items()})
