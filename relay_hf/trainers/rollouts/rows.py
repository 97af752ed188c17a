"""Rows of training text in the middle of being denoised. Legend: B rows, L positions, D hidden size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...modeling import RelayConfig
from .active_blocks import rounded_up
from .batches import TextRow, read_batch

MAIN_MEMORY = torch.device("cpu")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Sends a tensor; from main memory, without waiting for the device, which reads pinned memory by itself."""
    is_sent = device.type != "cpu" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if is_sent else tensor.to(device)


def fit_positions(tensor: Tensor, length: int) -> Tensor:
    """Pads the second axis (the positions) with zeros on the right, or trims it; returns a (B,) tensor unchanged."""
    if tensor.ndim == 1 or tensor.shape[1] == length:
        return tensor
    features = (0, 0) * (tensor.ndim - 2)
    return F.pad(tensor, (*features, 0, length - tensor.shape[1]))


@dataclass(frozen=True)
class RolloutRows:
    """Rows in the middle of being denoised; every tensor has the rows as first axis.

    Args:
        clean_ids: (B, L) tokens of the text.
        learned: (B, L) bool, positions that are learned; the others are always visible.
        attention_mask: (B, L) bool, False at padding, which is on the right.
        masked: (B, L) bool, positions that are still masked, a subset of `learned`.
        relay_state: (B, L, D) fp32, detached state of the last step; None if the objective carries no state.
        has_state: (B,) bool, False for rows that have not been denoised yet.
        reveal_steps: (B, L) long, number of the denoise step of its block, from 1, in which a trace revealed a learned
            position; 0 if it was known before the first, as is the first token of a block of token-shift models; not
            read elsewhere. None = the rows have no trace.
    """

    clean_ids: Tensor
    learned: Tensor
    attention_mask: Tensor
    masked: Tensor
    relay_state: Tensor | None
    has_state: Tensor
    reveal_steps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.clean_ids)

    @property
    def is_finished(self) -> Tensor:
        """(B,) bool, rows with nothing left to reveal."""
        return ~self.masked.any(-1)

    def to(self, device: torch.device) -> "RolloutRows":
        """The rows on another device."""
        return self.map(lambda tensor: to_device(tensor, device))

    def noisy_ids(self, mask_token_id: int) -> Tensor:
        """(B, L) the text with [MASK] at the positions that are still masked."""
        return torch.where(self.masked, mask_token_id, self.clean_ids)

    def map(self, function: Callable[..., Tensor], *others: "RolloutRows") -> "RolloutRows":
        """Applies `function` to each tensor that is not None, together with the same tensor of each of `others`."""
        tensors: dict[str, Any] = {}
        for name in FIELDS:
            first, *rest = (getattr(rows, name) for rows in (self, *others))
            tensors[name] = None if first is None else function(first, *rest)
        return RolloutRows(**tensors)

    def fit(self, length: int) -> "RolloutRows":
        """The rows at another length; added positions are neither seen nor learned."""
        return self.map(lambda tensor: fit_positions(tensor, length))


FIELDS = tuple(field.name for field in fields(RolloutRows))


def fresh_rows(
    config: RelayConfig, batch: dict[str, Tensor], keeps_state: bool, device: torch.device = MAIN_MEMORY
) -> RolloutRows:
    """The rows of a batch, all masked; arguments and errors are those of `read_batch` and `all_masked`."""
    return all_masked(config, read_batch(batch, config), keeps_state, device)


def seen_length(config: RelayConfig, length: int) -> int:
    """Positions of a text that are seen: with the [MASK]s that fill up its last block, if the model has so many."""
    filled = rounded_up(length, config.block_size or 1)
    return max(length, min(filled, config.positions or filled))


def blank_rows(
    config: RelayConfig, count: int, keeps_state: bool, device: torch.device, has_trace: bool = False
) -> RolloutRows:
    """Rows without text, which count as finished; arguments as in `all_masked`."""
    nothing = torch.zeros(0, dtype=torch.long)
    no_text = TextRow(nothing, nothing.bool(), nothing if has_trace else None)
    return all_masked(config, [no_text] * count, keeps_state, device)


def all_masked(config: RelayConfig, texts: Sequence[TextRow], keeps_state: bool, device: torch.device) -> RolloutRows:
    """Rows in which every learned position is masked, padded on the right to the longest row.

    The last block of a row is filled up with [MASK]s that are seen but not learned: decoding has them there too, and
    without them the number of [MASK]s would show the model where the text ends.

    Args:
        config: configuration of the model.
        texts: B >= 1 texts.
        keeps_state: whether the rows keep the state that a step leaves.
        device: where the rows are put.
    """
    longest = max(len(text.ids) for text in texts)
    padding = 0 if config.block_size is None else config.mask_token_id
    clean_ids = torch.full((len(texts), rounded_up(longest, config.block_size or 1)), padding)
    learned = torch.zeros(clean_ids.shape, dtype=torch.bool)
    reveal_steps = None if texts[0].reveal_steps is None else torch.zeros_like(clean_ids)
    for row, (ids, marks, steps) in enumerate(texts):
        clean_ids[row, : len(ids)], learned[row, : len(ids)] = ids, marks
        if reveal_steps is not None:
            reveal_steps[row, : len(ids)] = steps
    seen = torch.tensor([seen_length(config, len(text.ids)) for text in texts])
    state = None
    if keeps_state:
        # Zeros also mean "no state yet": `has_state` distinguishes the two.
        state = torch.zeros(*clean_ids.shape, config.relay_state_width, device=device)
    rows = RolloutRows(
        clean_ids=clean_ids,
        learned=learned,
        attention_mask=torch.arange(clean_ids.shape[1]) < seen[:, None],
        masked=learned,
        relay_state=state,
        has_state=torch.zeros(len(texts), dtype=torch.bool),
        reveal_steps=reveal_steps,
    )
    return rows.to(device)
