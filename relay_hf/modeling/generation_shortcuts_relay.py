"""The sub-block cache: forwards over a part of a block, an approximation that Fast-dLLM (arXiv 2505.22618) publishes.

Once a forward over the whole block has left its keys and values in the cache, a step runs only the active sub-block
(Fast-dLLM's "dual cache") or all from there on ("prefix cache"). The rest of the block does not learn what is revealed
meanwhile.

Legend: B rows still being decoded, n of them that take part, S positions of a block, s of a part, D width of the state.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """What some rows run of their blocks in one forward.

    Args:
        rows: (B,) bool, those rows.
        begins: (B,) long, position of the block where each row's part begins; None = they run the whole block.
        length: scalar, positions of the part; not read if it is the whole block.
    """

    rows: Tensor
    begins: Tensor | None
    length: Tensor


class SubBlockCache:
    """Decides for each step which rows run their whole block, and which a part of it; made anew for each block.

    Args:
        reaches_end: a part goes on to the end of the block.
        size: positions of a sub-block.
        token_shift: of the model: a part alone cannot score its own first position, which the one before scores.
        is_canvas: the whole sequence is one block.
        refreshed: (B,) long, sub-block at whose start each row last ran its whole block; none at first.
    """

    def __init__(self, reaches_end: bool, size: int, token_shift: bool, is_canvas: bool, refreshed: Tensor) -> None:
        self.reaches_end = reaches_end
        self.size = size
        self.token_shift = token_shift
        self.is_canvas = is_canvas
        self.refreshed = refreshed

    @classmethod
    def of(cls, options: Any, config: Any, nowhere: Tensor) -> "SubBlockCache | None":
        """The one that the options ask for, or None; `nowhere`: (B,) long, number of no sub-block."""
        if not options.use_sub_block_cache:
            return None
        reaches_end = options.use_sub_block_cache == "prefix"
        return cls(reaches_end, options.sub_block_size, config.token_shift, config.block_size is None, nowhere)

    def parts(self, step: Any) -> list[Part]:
        """The forwards of a step; on a canvas, those of the first one score less, see below."""
        place = torch.arange(step.masked.shape[1], device=step.masked.device)
        is_first = place == step.begins.clamp(min=0)[:, None]
        is_first_masked = (step.candidates & is_first).any(-1) & self.token_shift
        is_stale = step.active & ((self.refreshed != step.sub_block) | is_first_masked)
        self.refreshed = torch.where(is_stale, step.sub_block, self.refreshed)
        if self.is_canvas:
            # As Fast-dLLM does with Dream: that forward reveals what the following ones cannot, and nothing else.
            step.candidates = step.candidates & (is_first | ~is_first_masked[:, None])
            step.certain = step.candidates & is_first_masked[:, None]
        rest = len(place) - step.begins.where(step.active, len(place)).amin()
        length = rest if self.reaches_end else torch.full_like(rest, self.size)
        return [Part(is_stale, None, length), Part(step.active & ~is_stale, step.begins, length)]


def state_of_part(state: Tensor, part: Tensor, old: Tensor | None) -> Tensor:
    """The state of a part of the block, with one value for positions that came several times.

    Args:
        state: (n, s, D) as the forward left it.
        part: (n, s) positions of the block, ascending; where the block cuts the part off, one comes several times.
        old: (n, s, D) before the forward, of a token-shift model. What a part alone says of its first position is not
            aligned, and that position is known by then: it keeps its old state.
    """
    first = torch.searchsorted(part, part)  # (n, s) where each position came first
    state = state.gather(1, first[..., None].expand_as(state))
    return state if old is None else state.where((part != part[:, :1])[..., None], old.to(state.dtype))
