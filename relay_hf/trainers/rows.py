"""Rows of training text in the middle of being denoised. Legend: B rows, L positions, D hidden size."""

from dataclasses import dataclass, fields

from torch import Tensor
from torch.nn import functional as F


def fit_positions(tensor: Tensor, length: int) -> Tensor:
    """Pads with zeros or trims the second axis, the positions, on the right; rows alone, (B,), stay as they are."""
    if tensor.ndim == 1 or tensor.shape[1] == length:
        return tensor
    features = (0, 0) * (tensor.ndim - 2)
    return F.pad(tensor, (*features, 0, length - tensor.shape[1]))


@dataclass(frozen=True)
class RolloutRows:
    """Rows in the middle of being denoised; every tensor has the rows as first axis.

    Args:
        clean_ids: (B, L) the text.
        maskable: (B, L) bool, positions that are learned; the others are always visible.
        attention_mask: (B, L) bool, False at padding, which is on the right.
        noisy_ids: (B, L) the text with the positions that are still hidden replaced by [MASK].
        relay_state: (B, L, D) fp32, detached state of the last step, or None if the objective carries none.
        has_state: (B,) bool, False for rows that have not been denoised yet.
    """

    clean_ids: Tensor
    maskable: Tensor
    attention_mask: Tensor
    noisy_ids: Tensor
    relay_state: Tensor | None
    has_state: Tensor

    def masked(self, mask_token_id: int) -> Tensor:
        """(B, L) bool, positions that are still hidden."""
        return self.maskable & (self.noisy_ids == mask_token_id)

    def fit(self, length: int) -> "RolloutRows":
        """The rows at another length; what is added is neither seen nor learned."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return RolloutRows(**{n: None if t is None else fit_positions(t, length) for n, t in tensors.items()})
