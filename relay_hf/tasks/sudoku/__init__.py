"""Sudoku as text: puzzles of 4x4, 6x6 and 9x9 cells, a tokenizer whose mask token is the blank, and scores.

puzzles = split_puzzles(generate_puzzles(2_000, size=6), test_count=500)
train = augment_puzzles(puzzles["train"], rows=100_000)
features = to_features(train, make_sudoku_tokenizer(6))  # input_ids and labels for a trainer
"""

from .augmentation import augment_puzzles, random_symmetry
from .board import BoardShape, format_board, has_conflict, is_legal, parse_boards, parse_question, write_boards
from .data import load_sudoku, questions_to_ids, to_features
from .evaluation import SudokuEvaluation, evaluate_sudoku
from .generator import generate_puzzles
from .metrics import SudokuScores, score_solutions
from .signature import split_puzzles, symmetry_signature, symmetry_signatures
from .solver import count_solutions, solve
from .tokenizer import make_sudoku_tokenizer

__all__ = [
    "BoardShape",
    "SudokuEvaluation",
    "SudokuScores",
    "augment_puzzles",
    "count_solutions",
    "evaluate_sudoku",
    "format_board",
    "generate_puzzles",
    "has_conflict",
    "is_legal",
    "load_sudoku",
    "make_sudoku_tokenizer",
    "parse_boards",
    "parse_question",
    "questions_to_ids",
    "random_symmetry",
    "score_solutions",
    "solve",
    "split_puzzles",
    "symmetry_signature",
    "symmetry_signatures",
    "to_features",
    "write_boards",
]
