"""Rows of training text in the middle of being denoised. Legend: B rows, L positions, D hidden size."""

from dataclasses import dataclass

from torch import Tensor


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
