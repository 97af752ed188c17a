"""Sudoku boards as a study's workload: generated puzzles, the demo's model and recipe."""

from typing import Any

from datasets import Dataset

from relay_hf import RelayForMaskedDiffusion
from relay_hf.demo.arguments import DemoArguments
from relay_hf.demo.study import THRESHOLDS, load_puzzles, new_model, trainer_options
from relay_hf.tasks.sudoku import augment_puzzles, evaluate_sudoku, make_sudoku_tokenizer, to_features


class Boards:
    """Puzzles of one size.

    Args:
        sizes: of `DemoArguments`.

    Attributes:
        thresholds: confidence budgets at which each model is evaluated.
        forwards, levels: denoise forwards per puzzle, and exact match in percent, at which models are compared.
        check, careful: key of `relay_hf.traces.TASKS`, and options of `generate`, with which traces are made.
    """

    title, unit = "Sudoku", "puzzle"
    thresholds = (0.02, *THRESHOLDS)
    forwards = (3.0, 3.5, 4.0, 4.5)
    levels = (50.0, 60.0, 70.0, 80.0)
    check, careful = "sudoku", {"unmasking_policy": "confidence_budget", "unmasking_threshold": 0.02}

    def __init__(self, **sizes: Any) -> None:
        self.sizes = sizes
        arguments = self.arguments = DemoArguments(**sizes)
        self.steps, self.warmup_steps, self.test_rows = arguments.steps, arguments.warmup_steps, arguments.test_puzzles
        self.tokenizer, self.puzzles = make_sudoku_tokenizer(arguments.size), load_puzzles(arguments)

    def new_model(self, config: dict[str, Any], **sizes: Any) -> RelayForMaskedDiffusion:
        """A random model; `config` completes its configuration, `sizes` replace its own."""
        return new_model(DemoArguments(**self.sizes | sizes), self.tokenizer, **config)

    def options(self, objective: str, from_scratch: bool) -> dict[str, Any]:
        """Options of the trainer: the demo's, which are the published ones."""
        published = {"rows_on_demand": False, "staggered_start": False}
        return trainer_options(objective, self.arguments, from_scratch) | published

    def asked(self, count: int, seed: int) -> list[dict[str, str]]:
        """Training puzzles under ever new symmetries."""
        return augment_puzzles(self.puzzles["train"], rows=count, seed=seed).to_list()

    def texts(self, count: int, seed: int) -> Dataset:
        """The same, with their answers as labels."""
        return to_features(Dataset.from_list(self.asked(count, seed)), self.tokenizer)

    def evaluate(
        self, model: RelayForMaskedDiffusion, threshold: float, count: int | None = None, **options: Any
    ) -> dict[str, float]:
        """Mean denoise `forwards`, and shares of `exact` and `legal` boards, of the first `count` held-out puzzles."""
        puzzles = self.puzzles["test"]
        puzzles = puzzles.select(range(min(count or len(puzzles), len(puzzles))))
        found = evaluate_sudoku(model, self.tokenizer, puzzles, threshold, progress=False, **options)
        return {"forwards": found.denoise_forwards, "exact": found.scores.exact_match, "legal": found.scores.legal}
