"""Held-out puzzles that are no disguise of a training puzzle.

Relabelling digits, permuting rows inside a band, bands, columns inside a stack, stacks and (square boxes) transposing
turn a puzzle into a twin that is as good as the same to solve. A signature that all twins share keeps them together.
"""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, DatasetDict

from .board import BoardShape, parse_boards

_ROUNDS = 4
# A board as (N, bands, rows of a band, stacks, columns of a stack): the axes to sum for each part of it.
_PARTS = {"row": (3, 4), "band": (2, 3, 4), "column": (1, 2), "stack": (1, 2, 4), "box": (2, 4)}


def symmetry_signature(question: str) -> str:
    """A hash, as 16 hexadecimal digits, that no Sudoku symmetry changes.

    Different signatures prove that two puzzles are no twins. Equal signatures almost always mean twins, but that is not
    guaranteed.

    Raises: ValueError for a text that `parse_boards` refuses.
    """
    return f"{int(symmetry_signatures([question])[0]):016x}"


def symmetry_signatures(questions: Sequence[str]) -> np.ndarray:
    """The signatures of N puzzles of one size.

    Returns: (N,) uint64.
    Raises: ValueError for a text that `parse_boards` refuses.
    """
    boards = parse_boards(questions)
    shape = BoardShape.of_cells(boards.shape[-1])
    grids = boards.reshape(-1, shape.size, shape.size)
    signatures = _refine(grids, shape)
    if shape.square_boxes:
        signatures = signatures + _refine(grids.swapaxes(1, 2), shape)  # a sum has no order
    return signatures


def split_puzzles(dataset: Dataset, test_count: int, seed: int = 0) -> DatasetDict:
    """Split puzzles into `train` and `test` so that no test puzzle has a twin in train.

    Puzzles with one signature go to the same side. Should the last ones chosen for the test not fit into `test_count`,
    those left over are dropped, since they could only be twins of test puzzles.

    Args: dataset: has a column `question`. test_count: rows of `test`. seed: seed of the choice.
    Returns: a dictionary of the two datasets, both in shuffled order.
    Raises: ValueError if nothing would be left for one of the sides.
    """
    if test_count < 1:
        raise ValueError(f"`test_count={test_count}` leaves the test set empty: use 1 or more.")
    _, group = np.unique(symmetry_signatures(dataset["question"][:]), return_inverse=True)  # (N,) group numbers
    order = np.random.default_rng(seed).permutation(len(group))
    _, first = np.unique(group[order], return_index=True)  # where each group is met first
    order = order[np.argsort(first[group[order]], kind="stable")]  # members follow the first of their group
    in_test = np.isin(group[order], group[order[:test_count]])
    train, test = order[~in_test], order[:test_count]
    if len(train) == 0:
        raise ValueError(
            f"`test_count={test_count}` of {len(group)} puzzles ({len(first)} signatures) leaves none to train on: "
            "make more puzzles, or take a smaller test set."
        )
    return DatasetDict(train=dataset.select(train), test=dataset.select(test))


def _refine(grids: np.ndarray, shape: BoardShape) -> np.ndarray:
    """Colour refinement (Weisfeiler-Leman): a cell's colour becomes a hash of the colours it can see, a few times over.

    Args: grids: (N, S, S) digits, 0 for a blank.
    Returns: (N,) uint64, the same for all twins that are not transposed.
    """
    height, width = shape.box_height, shape.box_width
    grids = grids.reshape(-1, shape.size // height, height, shape.size // width, width)
    colours = _mix((grids > 0).astype(np.uint64))
    for _ in range(_ROUNDS):
        views = [colours.sum(axes, keepdims=True) for axes in _PARTS.values()]  # sums, since order must not matter
        views.append(_sum_over_same_digit(colours, grids, shape.size))
        for view in views:
            colours = _mix(colours + view)  # one after the other, so that a row is not taken for a column
    return _mix(colours).sum((1, 2, 3, 4))


def _sum_over_same_digit(colours: np.ndarray, grids: np.ndarray, size: int) -> np.ndarray:
    """Each clue sees the sum of the colours of all clues with its digit; blanks see 0. Shapes as in `_refine`."""
    seen = np.zeros_like(colours)
    for digit in range(1, size + 1):
        same = grids == digit
        seen += same * (colours * same).sum((1, 2, 3, 4), keepdims=True)
    return seen


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble uint64 values one by one (the finalizer of SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
