"""Random Sudoku puzzles with one solution and no superfluous clue.

Each puzzle starts from its own random solved board, whose clues are taken away in random order as long as the solution
stays unique. One pass is enough: a clue that was needed among more clues is still needed among fewer.
"""

import random

from datasets import Dataset
from tqdm.auto import tqdm

from .board import BoardShape
from .solver import candidates_of, search

_PATIENCE = 1000  # repeated puzzles in a row after which the boards of this kind count as used up


def generate_puzzles(count: int, size: int = 6, seed: int = 0, progress: bool = True, extra_clues: int = 0) -> Dataset:
    """Make `count` distinct puzzles; the same seed gives the same puzzles, and a larger count only appends to them.

    Args:
        count: number of puzzles.
        size: 4, 6 or 9 (about 0.2, 1 and 10 ms a puzzle).
        seed: seed of the random boards and of the order in which clues are removed.
        progress: show a progress bar.
        extra_clues: cells of the solution given back to every finished puzzle. With 0 a puzzle is minimal: without any
            one of its clues it has several solutions. With more it is easier, and no longer minimal.

    Returns: a dataset with the strings `question` ("." for a blank) and `answer`.
    Raises: ValueError for a bad count, size or number of extra clues, or if there are not that many distinct puzzles.
    """
    shape = BoardShape.of_size(size)
    if count < 1:
        raise ValueError(f"`count={count}` makes no puzzles: use 1 or more.")
    if not 0 <= extra_clues < shape.cells:
        raise ValueError(
            f"`extra_clues={extra_clues}` must lie between 0 and {shape.cells - 1}: choose a small number."
        )
    rng = random.Random(seed)
    answers: dict[str, str] = {}  # question -> answer, in the order found
    repeats = 0
    with tqdm(total=count, desc=f"Sudoku {size}x{size}", unit="puzzle", disable=not progress) as bar:
        while len(answers) < count:
            question, answer = _random_puzzle(shape, rng, extra_clues)
            repeats = repeats + 1 if question in answers else 0
            if repeats == _PATIENCE:
                raise ValueError(
                    f"Only {len(answers)} distinct {size}x{size} puzzles turned up, not `count={count}`: ask for fewer."
                )
            if repeats == 0:
                answers[question] = answer
                bar.update()
    return Dataset.from_dict({"question": list(answers.keys()), "answer": list(answers.values())})


def _random_puzzle(shape: BoardShape, rng: random.Random, extra_clues: int) -> tuple[str, str]:
    """One question and its answer."""
    empty = candidates_of([0] * shape.cells, shape)
    solution = next(search(empty, shape, rng))
    board = _dig(solution, shape, rng)
    blanks = [cell for cell, digit in enumerate(board) if digit == 0]
    if extra_clues > len(blanks):
        raise ValueError(f"`extra_clues={extra_clues}` is more than the {len(blanks)} blanks of a puzzle: use fewer.")
    for cell in rng.sample(blanks, extra_clues):
        board[cell] = solution[cell]
    return "".join(str(digit) if digit else "." for digit in board), "".join(map(str, solution))


def _dig(solution: list[int], shape: BoardShape, rng: random.Random) -> list[int]:
    """Take clues away in random order while the solution stays unique: a minimal puzzle, 0 for a blank."""
    board = list(solution)
    for cell in rng.sample(range(shape.cells), shape.cells):
        digit, board[cell] = board[cell], 0
        others = candidates_of(board, shape)
        others[digit - 1] &= ~(1 << cell)  # any solution without this digit here is a second one
        if next(search(others, shape), None) is not None:
            board[cell] = digit
    return board
