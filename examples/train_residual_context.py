"""Residual context diffusion (RCD, arXiv 2601.22954) in its two stages, on 4x4 Sudoku: seconds.

python examples/train_residual_context.py [--steps 300]

Stage 1 trains a small reference as a plain masked diffusion model. In stage 2 it is frozen: it reads the same noisy
boards as the target, and its predictions are what the target's masks carry.
"""

import argparse
import tempfile
from typing import Any

from relay_hf import RelayForMaskedDiffusion
from relay_hf.tasks.sudoku import evaluate_sudoku, generate_puzzles, make_sudoku_tokenizer, split_puzzles, to_features
from relay_hf.testing import tiny_model
from relay_hf.trainers import RelayTrainer, RelayTrainerConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each stage")
arguments = parser.parse_args()

tokenizer = make_sudoku_tokenizer(4)
puzzles = split_puzzles(generate_puzzles(120, size=4, seed=0), test_count=20)


def new_model(hidden_size: int, layers: int, **channel: Any) -> RelayForMaskedDiffusion:
    sizes = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": layers}
    return tiny_model(tokenizer, text={**sizes, "initializer_range": 0.02}, block_size=None, **channel)


def train(model: RelayForMaskedDiffusion, objective: Any, folder: str, reference: Any = None) -> None:
    trainer = RelayTrainer(
        model,
        RelayTrainerConfig(
            folder, objective=objective, max_steps=arguments.steps, learning_rate=2e-3, per_device_train_batch_size=64,
            logging_steps=max(arguments.steps // 4, 1), save_strategy="no", report_to=[], max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=to_features(puzzles["train"], tokenizer),
        processing_class=tokenizer,
        reference_model=reference,
    )  # fmt: skip
    trainer.train()


with tempfile.TemporaryDirectory() as scratch:
    reference = new_model(32, layers=1, relay_channel="none")
    train(reference, "masked", scratch)
    target = new_model(64, layers=2, relay_channel="residual_context")
    train(target, "residual_context", scratch, reference)

for use_relay in (True, False):
    result = evaluate_sudoku(target, tokenizer, puzzles["test"], 0.15, use_relay=use_relay, progress=False)
    print(
        f"{'with' if use_relay else 'without'} the residual: {100 * result.scores.cell_accuracy:.0f} % of the cells in "
        f"{result.denoise_forwards:.1f} denoise forwards per puzzle"
    )
