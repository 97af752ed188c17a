"""How well puzzles were solved."""

from collections.abc import Sequence
from dataclasses import dataclass

from .board import BoardShape, is_legal, parse_boards, read_boards


@dataclass(frozen=True)
class SudokuScores:
    """Scores of a set of puzzles, as fractions between 0 and 1.

    Attributes:
        exact_match: solutions equal to the answer in every cell.
        cell_accuracy: right cells among all blanks of all puzzles.
        legal: solutions with each digit once in every row, column and box that also keep the clues; for puzzles with
            one solution this equals `exact_match`.
        puzzles: number of puzzles scored.
    """

    exact_match: float
    cell_accuracy: float
    legal: float
    puzzles: int


def score_solutions(questions: Sequence[str], answers: Sequence[str], solutions: Sequence[str]) -> SudokuScores:
    """Compare the solutions of a model with the answers.

    Args: questions, answers: boards of one size. solutions: as long; a character that is no digit is wrong.
    Raises: ValueError if the three differ in number or size, if a question or answer is no board, or if there is
        nothing to score.
    """
    if not len(questions) == len(answers) == len(solutions):
        raise ValueError(
            f"{len(questions)} questions, {len(answers)} answers and {len(solutions)} solutions cannot be compared: "
            "give one of each per puzzle."
        )
    clues = parse_boards(questions)  # (N, cells)
    shape = BoardShape.of_cells(clues.shape[-1])
    truth, found = parse_boards(answers, shape, solved=True), read_boards(solutions, shape)
    blank = clues == 0
    if not blank.any():
        raise ValueError("The questions have no blanks, so there is nothing to score: give puzzles, not solved boards.")
    right = found == truth
    keeps_clues = (blank | (found == clues)).all(1)
    return SudokuScores(
        exact_match=float(right.all(1).mean()),
        cell_accuracy=float(right[blank].mean()),
        legal=float((is_legal(found) & keeps_clues).mean()),
        puzzles=len(clues),
    )
