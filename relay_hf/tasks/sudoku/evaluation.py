"""Solving held-out puzzles and counting what it costs."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .data import questions_to_ids
from .metrics import SudokuScores, score_solutions


@dataclass(frozen=True)
class SudokuEvaluation:
    """One evaluation of a model at one threshold.

    Args:
        threshold: the unmasking threshold.
        scores: fractions over the puzzles.
        denoise_forwards: mean number of denoise forwards per puzzle, counted per puzzle and not per batch. A model that
            fills in a canvas has no commit and no prefill forwards.
    """

    threshold: float
    scores: SudokuScores
    denoise_forwards: float


def evaluate_sudoku(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    puzzles: Dataset,
    threshold: float,
    *,
    use_relay: bool = True,
    batch_size: int = 250,
    progress: bool = True,
    **options: Any,
) -> SudokuEvaluation:
    """Solves `puzzles` (columns `question`, `answer`) with the confidence-budget policy at one threshold.

    Args:
        model, tokenizer: the solver.
        puzzles: the puzzles to solve.
        threshold: the unmasking threshold.
        use_relay: carry the state between denoising steps.
        batch_size: puzzles at a time.
        progress: show a bar.
        options: further ones of `generate`.

    Raises:
        ValueError: `puzzles` is empty.
    """
    if len(puzzles) == 0:
        raise ValueError("There are no puzzles to evaluate: pass at least one.")
    model.eval()
    canvases = questions_to_ids(puzzles["question"], tokenizer)
    solutions: list[str] = []
    forwards: list[int] = []
    batches = tqdm(canvases.split(batch_size), desc=f"threshold {threshold:g}", leave=False, disable=not progress)
    for batch in batches:
        output = model.generate(
            batch.to(model.device),
            attention_mask=torch.ones_like(batch, device=model.device),
            unmasking_policy="confidence_budget",
            unmasking_threshold=threshold,
            use_relay=use_relay,
            return_dict_in_generate=True,
            **options,
        )
        solutions += tokenizer.batch_decode(output.sequences)
        forwards += output.denoise_forwards.tolist()
    scores = score_solutions(puzzles["question"], puzzles["answer"], solutions)
    return SudokuEvaluation(threshold, scores, sum(forwards) / len(forwards))
