from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from relay_hf.tasks.sudoku import evaluate_sudoku, generate_puzzles, make_sudoku_tokenizer, questions_to_ids


class Oracle:
    """Answers some puzzles rightly, and says it took its row's number of forwards."""

    device = "cpu"

    def __init__(self, puzzles: Dataset, right: int) -> None:
        self.tokenizer = make_sudoku_tokenizer(4)
        self.answers = questions_to_ids(puzzles["answer"], self.tokenizer)
        self.right, self.seen, self.options = right, 0, []

    def eval(self) -> None:
        pass

    def generate(self, canvas: torch.Tensor, **options: object) -> SimpleNamespace:
        rows = torch.arange(self.seen, self.seen + len(canvas))
        self.seen += len(canvas)
        self.options.append(options)
        solved = torch.where(rows[:, None] < self.right, self.answers[rows], torch.full_like(canvas, 2))
        sequences = torch.where(canvas == self.tokenizer.mask_token_id, solved, canvas)
        return SimpleNamespace(sequences=sequences, denoise_forwards=rows)


def test_evaluate_sudoku_counts_forwards_per_puzzle_and_scores_solutions() -> None:
    puzzles = generate_puzzles(10, size=4, progress=False)
    oracle = Oracle(puzzles, right=6)
    result = evaluate_sudoku(oracle, oracle.tokenizer, puzzles, 0.25, use_relay=False, batch_size=4, progress=False)
    assert result.scores.exact_match == pytest.approx(0.6)
    assert result.scores.puzzles == 10
    assert result.denoise_forwards == pytest.approx(4.5)
    assert all(options["unmasking_threshold"] == 0.25 and not options["use_relay"] for options in oracle.options)


def test_evaluate_sudoku_without_puzzles_raises() -> None:
    puzzles = generate_puzzles(1, size=4, progress=False).select([])
    with pytest.raises(ValueError, match="no puzzles to evaluate"):
        evaluate_sudoku(None, make_sudoku_tokenizer(4), puzzles, 0.1)
