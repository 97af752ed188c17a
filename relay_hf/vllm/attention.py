"""Block-causal attention with any kernel: every block of a step's tokens is shown to it as a sequence of its own.

The sequence of a block ends with the block, has the pages of its request, and no causality inside. So a chunk of a
prompt, a denoise step and a commit are one pattern, and steps of different requests share a forward.
"""

from typing import NamedTuple

import numpy as np


class Pieces(NamedTuple):
    """The blocks of a step, in the order of its tokens: M of them.

    Attributes:
        rows: (M,) request that each block belongs to.
        starts: (M + 1,) int32 number of its first token among those of the step; last the number of tokens.
        ends: (M,) int32 position behind the block's last token.
    """

    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def cut_into_blocks(lengths: np.ndarray, ends: np.ndarray, size: int) -> Pieces:
    """Cuts the tokens of each request into blocks.

    Args:
        lengths: (n,) tokens of each request in the step; their first one begins a block.
        ends: (n,) position behind its last token.
        size: positions of a block.
    """
    counts = -(-lengths // size)
    rows = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)  # of a block among its request's
    cut = np.minimum((number + 1) * size, lengths[rows])
    starts = np.concatenate([[0], np.cumsum(cut - number * size)])
    return Pieces(rows, starts.astype(np.int32), ((ends - lengths)[rows] + cut).astype(np.int32))
