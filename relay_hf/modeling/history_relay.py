"""What the block decoder notes for `output_history`: which denoise forward revealed which column, and how surely."""

import torch
from torch import Tensor

from .grid_relay import DecodingGrid
from .outputs_relay import RelayGenerateHistory


class RevealRecorder:
    """Two numbers for every column of the decoder's grid, kept for all rows whether they still decode or not.

    Args:
        tokens: (B, W) the grid of the batch as it was given; only its shape and device matter.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.revealed_at = torch.zeros_like(tokens, dtype=torch.long)  # (B, W)
        self.confidence = torch.zeros_like(tokens, dtype=torch.float32)  # (B, W)

    def record(
        self, rows: Tensor, columns: slice, revealed: Tensor, confidence: Tensor, forward: Tensor | None = None
    ) -> None:
        """Notes the reveals of one step.

        Args:
            rows: (N,) where the rows that still decode stand in the batch.
            columns: the S columns the step looked at.
            revealed: (N, S) bool, positions whose token it fixed.
            confidence: (N, S) fp32 probability of those tokens.
            forward: (N,) each row's own number of the denoise forward; None for a prefill or commit, noted as 0.
        """
        at = torch.zeros_like(rows) if forward is None else forward
        self.revealed_at[rows, columns] = torch.where(revealed, at[:, None], self.revealed_at[rows, columns])
        self.confidence[rows, columns] = torch.where(revealed, confidence, self.confidence[rows, columns])

    def history(self, grid: DecodingGrid, denoise_forwards: Tensor) -> RelayGenerateHistory:
        """What was noted, in the layout of the caller's prompts; `denoise_forwards`: (B,) of each row."""
        prompts = grid.prompts
        revealed_at = grid.as_given(self.revealed_at, torch.full_like(prompts, -1), -1)
        no_confidence = torch.zeros_like(prompts, dtype=torch.float32)
        given = torch.zeros_like(revealed_at, dtype=torch.bool)
        given[:, : prompts.shape[1]] = grid.is_text & (prompts != grid.mask_token_id)
        return RelayGenerateHistory(
            revealed_at=revealed_at,
            confidence=grid.as_given(self.confidence, no_confidence, 0.0),
            given=given,
            denoise_forwards=denoise_forwards,
        )
