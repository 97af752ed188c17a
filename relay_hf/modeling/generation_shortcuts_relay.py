"""The sub-block cache: forwards over a part of a block, an approximation that Fast-dLLM (arXiv 2505.22618) publishes.

Once a forward over the whole block has left its keys and values in the cache, a step runs only the active sub-block
(Fast-dLLM's "dual cache") or all from there on ("prefix cache"). The rest of the block does not learn what is revealed
meanwhile.

Legend: B rows still being decoded, n of them that take part, S positions of a block, s of a part, D width of the state.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """The part of their block that some rows run in one forward.

    Args:
        rows: (B,) bool, True for those rows.
        candidates: (B, S) bool, positions of theirs that the forward scores.
        begins: (B,) long, position of the block where each row's part begins; None = the rows run the whole block.
        length: scalar, positions of the part; None = the whole block.
    """

    rows: Tensor
    candidates: Tensor
    begins: Tensor | None
    length: Tensor | None


@dataclass
class SubBlockCache:
    """Decides for each step which rows run their whole block, and which a part of it; made anew for each block.

    Args:
        reaches_end: a part extends to the end of the block.
        size: positions of a sub-block.
        token_shift: the model scores a position at the one before it, so that a part cannot score its own first one.
        is_canvas: the whole sequence is one block.
        refreshed: (B,) long, sub-block at whose start each row last ran its whole block; none at first.
    """

    reaches_end: bool
    size: int
    token_shift: bool
    is_canvas: bool
    refreshed: Tensor

    @classmethod
    def of(cls, options: Any, config: Any, nowhere: Tensor) -> "SubBlockCache | None":
        """The sub-block cache that the options ask for, or None; `nowhere`: (B,) long, a number of no sub-block."""
        if not options.use_sub_block_cache:
            return None
        reaches_end = options.use_sub_block_cache == "prefix"
        return cls(reaches_end, options.sub_block_size, config.token_shift, config.block_size is None, nowhere)

    def parts(self, step: Any) -> list[Part]:
        """The parts that a step runs, one forward each; on a canvas, `step.candidates` and `step.certain` change."""
        place = torch.arange(step.masked.shape[1], device=step.masked.device)
        is_first = place == step.begins.clamp(min=0)[:, None]
        is_first_masked = (step.candidates & is_first).any(-1) & self.token_shift
        is_stale = step.active & ((self.refreshed != step.sub_block) | is_first_masked)
        self.refreshed = torch.where(is_stale, step.sub_block, self.refreshed)
        if self.is_canvas:
            # As Fast-dLLM does with Dream: the first forward reveals only the position that later ones cannot score.
            step.candidates = step.candidates & (is_first | ~is_first_masked[:, None])
            step.certain = step.candidates & is_first_masked[:, None]
        rest = len(place) - step.begins.where(step.active, len(place)).amin()
        length = rest if self.reaches_end else torch.full_like(rest, self.size)
        is_fresh = step.active & ~is_stale
        whole, part = (step.candidates & rows[:, None] for rows in (is_stale, is_fresh))
        return [Part(is_stale, whole, None, None), Part(is_fresh, part, step.begins, length)]


def state_of_part(state: Tensor, part: Tensor, old: Tensor | None) -> Tensor:
    """The state of a part of the block, with one value for positions that came several times.

    Args:
        state: (n, s, D) state that the forward left.
        part: (n, s) positions of the block, ascending; the last is repeated where the block cuts the part off.
        old: (n, s, D) state before the forward, of a token-shift model: the first position of the part keeps it,
            because a part alone cannot align that position, whose token is known by then. None = no token shift.
    """
    first = torch.searchsorted(part, part)  # (n, s) where each position came first
    state = state.gather(1, first[..., None].expand_as(state))
    return state if old is None else state.where((part != part[:, :1])[..., None], old.to(state.dtype))
