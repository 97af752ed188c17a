"""Rows of training text in the middle of being denoised. Legend: B rows, L positions, D hidden size."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...modeling import RelayConfig
from .batches import TextBatch, read_batch


def fit_positions(tensor: Tensor, length: int) -> Tensor:
    """Pads with zeros or trims the second axis, the positions, on the right; a (B,) tensor has none and stays equal."""
    if tensor.ndim == 1 or tensor.shape[1] == length:
        return tensor
    features = (0, 0) * (tensor.ndim - 2)
    return F.pad(tensor, (*features, 0, length - tensor.shape[1]))


@dataclass(frozen=True)
class RolloutRows:
    """Rows in the middle of being denoised; every tensor has the rows as first axis.

    Args:
        clean_ids: (B, L) the text.
        learned: (B, L) bool, positions that are learned; the others are always visible.
        attention_mask: (B, L) bool, False at padding, which is on the right.
        masked: (B, L) bool, positions that are still masked, a subset of `learned`.
        relay_state: (B, L, D) fp32, detached state of the last step, or None if the objective carries none.
        has_state: (B,) bool, False for rows that have not been denoised yet.
    """

    clean_ids: Tensor
    learned: Tensor
    attention_mask: Tensor
    masked: Tensor
    relay_state: Tensor | None
    has_state: Tensor

    def __len__(self) -> int:
        return len(self.clean_ids)

    @property
    def is_finished(self) -> Tensor:
        """(B,) bool, rows with nothing left to reveal."""
        return ~self.masked.any(-1)

    def noisy_ids(self, mask_token_id: int) -> Tensor:
        """(B, L) the text with [MASK] at the positions that are still masked."""
        return torch.where(self.masked, mask_token_id, self.clean_ids)

    def map(self, function: Callable[..., Tensor], *others: "RolloutRows") -> "RolloutRows":
        """Applies `function` to each tensor that is not None, together with that of every other rows."""
        tensors: dict[str, Any] = {}
        for name in FIELDS:
            first, *rest = (getattr(rows, name) for rows in (self, *others))
            tensors[name] = None if first is None else function(first, *rest)
        return RolloutRows(**tensors)

    def fit(self, length: int) -> "RolloutRows":
        """The rows at another length; added positions are neither seen nor learned."""
        return self.map(lambda tensor: fit_positions(tensor, length))


FIELDS = tuple(field.name for field in fields(RolloutRows))


def fresh_rows(config: RelayConfig, batch: dict[str, Tensor], keeps_state: bool) -> RolloutRows:
    """The rows of a batch, all masked; arguments and errors are those of `read_batch` and `all_masked`."""
    return all_masked(config, read_batch(batch, config), keeps_state)


def all_masked(config: RelayConfig, text: TextBatch, keeps_state: bool) -> RolloutRows:
    """Rows in which everything to be learned is masked.

    The last block of a row is filled up with [MASK]s that are seen but not learned: decoding has them there too, and
    without them their number would show the model where the text ends.

    Args:
        config: the model's configuration.
        text: the rows.
        keeps_state: whether the rows keep the state that a step leaves.
    """
    clean_ids, learned, attention_mask = text
    if config.block_size is not None:
        blocks = -(-text.is_text.sum(-1) // config.block_size)  # (B,)
        length = max(int(blocks.max()) * config.block_size, clean_ids.shape[1])
        clean_ids, learned, is_text = (fit_positions(tensor, length) for tensor in text)
        clean_ids = clean_ids.where(is_text, config.mask_token_id)
        # Not beyond the positions that the model has.
        filled = blocks * config.block_size
        filled = filled.clamp(max=config.positions).maximum(is_text.sum(-1)) if config.positions else filled
        attention_mask = torch.arange(length, device=blocks.device) < filled[:, None]
    rows, length = clean_ids.shape
    state = None
    if keeps_state:
        # Zeros also mean "no state yet": `has_state` distinguishes the two.
        state = torch.zeros(rows, length, config.relay_state_width, device=clean_ids.device)
    return RolloutRows(
        clean_ids=clean_ids,
        learned=learned,
        attention_mask=attention_mask,
        masked=learned,
        relay_state=state,
        has_state=torch.zeros(rows, dtype=torch.bool, device=clean_ids.device),
    )
