"""The positions that a denoise step is about, as functions of tensors that wait for nothing.

Legend: B rows, S positions of a block. Columns are counted from the block's first one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .unmasking_relay import Progress, in_earliest_sub_block, sub_blocks_of


class Texts(NamedTuple):
    """One block of every row.

    Attributes:
        tokens: (B, S) long, [MASK] where none is revealed yet.
        visible: (B, S) bool, columns that hold a position of the row.
        prompt_end: (B,) column of the row's first new token.
        end: (B,) column behind its last token.
        anchor: (B,) column from which its sub-blocks are counted.
    """

    tokens: Tensor
    visible: Tensor
    prompt_end: Tensor
    end: Tensor
    anchor: Tensor

    def masked(self, mask_token_id: int) -> Tensor:
        """(B, S) bool, masked positions of the rows' own texts."""
        return (self.tokens == mask_token_id) & self.visible


class Candidates(NamedTuple):
    """What the next step of every row is about.

    Attributes:
        masked: (B, S) bool, masked positions of the rows' own texts.
        candidates: (B, S) bool, those of the sub-block in work, of rows that take part.
        active: (B,) bool, rows that take part.
        sub_block: (B,) long, number of that sub-block.
        begins: (B,) long, column at which it begins; negative if the block cuts it off.
        end: (B,) column behind each row's last token, the stop tokens that are there considered.
    """

    masked: Tensor
    candidates: Tensor
    active: Tensor
    sub_block: Tensor
    begins: Tensor
    end: Tensor


def find_candidates(texts: Texts, stops: Tensor | None, size: int | Tensor, mask_token_id: int) -> Candidates:
    """Finds the masked positions that come next; those behind a row's end or its stop token need no forward.

    Args:
        texts: the block of every row.
        stops: (n,) tokens that end a row, (B, 1, n) if each row has its own, or None.
        size: positions of a sub-block; one number for all rows, or (B,) long.
        mask_token_id: id of [MASK].
    """
    column = torch.arange(texts.tokens.shape[1], device=texts.tokens.device)
    masked = texts.masked(mask_token_id)
    end = texts.end
    if stops is not None:
        # Not `isin`, which sorts many stop tokens, and waits for the device to do so.
        is_stop = (texts.tokens[..., None] == stops).any(-1) & (column >= texts.prompt_end[:, None])
        end = torch.where(is_stop, column + 1, end[:, None]).amin(-1).minimum(end)
    needed = masked & (column < end[:, None])
    active = needed.any(-1)
    sub_blocks = sub_blocks_of(len(column), size, texts.anchor)
    candidates = masked & in_earliest_sub_block(needed, sub_blocks) & active[:, None]
    sub_block = sub_blocks.gather(1, needed.long().argmax(-1, keepdim=True))[:, 0]
    return Candidates(masked, candidates, active, sub_block, texts.anchor + sub_block * size, end)


def progress_before(
    progress: Progress, sub_block: Tensor, now: Candidates, size: int | Tensor, is_canvas: bool
) -> Progress:
    """The steps that each row has had within the sub-block of its next step.

    In a block model, the steps are for all positions of a sub-block, prompt included, as SDAR counts them; on a canvas,
    for those that were masked at the sub-block's first step.

    Args:
        progress: of each row, its last step included.
        sub_block: (B,) long, sub-block that each row's last step was about.
        now: what the next step is about.
        size: positions of a sub-block; one number for all rows, or (B,) long.
        is_canvas: the whole sequence is one block.
    """
    is_new = now.active & (now.sub_block != sub_block)
    masks = now.candidates.sum(-1)
    total = masks if is_canvas else size if isinstance(size, Tensor) else torch.full_like(masks, size)
    return Progress(progress.step.where(~is_new, 0), progress.positions.where(~is_new, total))
