"""A small Sudoku solver on bit boards: it counts solutions, and solves puzzles that have exactly one.

The state is one Python int per digit whose bit c says "cell c may still hold this digit". A few `|` and `&` over these
ints look at all cells at once: which cell has no digit left (dead end), only one (forced) or two (best place to guess).
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

from .board import BoardShape, parse_question


@dataclass(frozen=True)
class _Masks:
    """Cell sets of one board shape, as bits."""

    every_cell: int
    units: tuple[int, ...]  # one set per row, column and box
    keep: dict[int, int]  # bit of a cell -> the cells that may have the same digit as it (all but its peers)


def count_solutions(question: str, limit: int = 2) -> int:
    """The number of solutions of a puzzle, counted up to `limit` (2 is enough to know whether it is unique).

    Raises: ValueError for a question that `parse_question` refuses, or if `limit` is not positive.
    """
    if limit < 1:
        raise ValueError(f"`limit={limit}` counts nothing: use 1 or more.")
    return len(_solutions(question, limit))


def solve(question: str) -> str:
    """The only solution of a puzzle.

    Raises: ValueError for a question that `parse_question` refuses, or that has no solution or more than one.
    """
    solutions = _solutions(question, limit=2)
    if len(solutions) != 1:
        found, fix = ("no solution", "correct its clues") if not solutions else ("more than one solution", "add clues")
        raise ValueError(f"The puzzle {question!r} has {found}, but a Sudoku has exactly one: {fix}.")
    return "".join(map(str, solutions[0]))


def _solutions(question: str, limit: int) -> list[list[int]]:
    """The first solutions of a puzzle."""
    board = parse_question(question).tolist()
    shape = BoardShape.of_cells(len(board))
    return list(islice(search(candidates_of(board, shape), shape), limit))


def candidates_of(board: Sequence[int], shape: BoardShape) -> list[int]:
    """What the clues of a board (0 = blank) leave open: for every digit the set of cells that may hold it, as bits."""
    masks = _masks_of(shape)
    candidates = [masks.every_cell] * shape.size
    clues = [0] * shape.size
    for cell, digit in enumerate(board):
        if digit:
            candidates[digit - 1] &= masks.keep[1 << cell]
            clues[digit - 1] |= 1 << cell
    blank = masks.every_cell & ~sum(clues)
    return [cells & (blank | mine) for cells, mine in zip(candidates, clues, strict=True)]


def search(candidates: Sequence[int], shape: BoardShape, rng: random.Random | None = None) -> Iterator[list[int]]:
    """All completions of a state, one after the other, each as a list of `shape.cells` digits.

    Args: candidates: for every digit the cells that may hold it. rng: shuffles the guesses (else lowest digit first).
    """
    return _search(list(candidates), 0, _masks_of(shape), rng)


def _search(candidates: list[int], placed: int, masks: _Masks, rng: random.Random | None) -> Iterator[list[int]]:
    """Depth-first search below a state; works on `candidates` in place.

    `placed` are the cells that hold their digit already, so that their peers have lost it.
    """
    while True:
        once = twice = thrice = 0  # cells with at least one, two, three candidates
        for cells in candidates:
            thrice |= twice & cells
            twice |= once & cells
            once |= cells
        if once != masks.every_cell:
            return  # a cell has no digit left
        forced = once & ~twice & ~placed
        if not forced:
            break
        placed |= forced
        for digit, cells in enumerate(candidates):
            for bit in _bits(cells & forced):
                candidates[digit] &= masks.keep[bit]

    if not twice:
        yield _digits_of(candidates)
        return
    guesses = _best_guesses(candidates, twice, thrice, placed, masks)
    if rng is not None:
        rng.shuffle(guesses)
    for digit, bit in guesses:
        child = [cells & ~bit for cells in candidates]
        child[digit] = candidates[digit] & masks.keep[bit]
        yield from _search(child, placed | bit, masks, rng)


def _best_guesses(candidates: list[int], twice: int, thrice: int, placed: int, masks: _Masks) -> list[tuple[int, int]]:
    """Placements (digit index, bit of the cell), one of which every solution has; as few as can be found cheaply."""
    for digit, cells in enumerate(candidates):
        for unit in masks.units:
            places = cells & unit
            if not places & (places - 1):  # the digit has at most one place left in the unit
                if not places:
                    return []
                if not places & placed:
                    return [(digit, places)]
    open_cells = twice & ~thrice or twice  # cells with two candidates, else with more
    bit = open_cells & -open_cells
    return [(digit, bit) for digit, cells in enumerate(candidates) if cells & bit]


def _digits_of(candidates: list[int]) -> list[int]:
    """The board of a state in which every cell has one candidate."""
    board = {bit: digit for digit, cells in enumerate(candidates, start=1) for bit in _bits(cells)}
    return [board[bit] for bit in sorted(board)]


def _bits(cells: int) -> Iterator[int]:
    """The single bits of a set of cells, lowest first."""
    while cells:
        bit = cells & -cells
        yield bit
        cells ^= bit


@cache
def _masks_of(shape: BoardShape) -> _Masks:
    """The cell sets of a board shape."""
    every_cell = (1 << shape.cells) - 1
    units = [sum(1 << cell for cell in unit) for unit in shape.units.tolist()]
    keep = {}
    for bit in _bits(every_cell):
        keep[bit] = every_cell
        for unit in units:
            if unit & bit:
                keep[bit] &= ~unit | bit
    return _Masks(every_cell, tuple(units), keep)
