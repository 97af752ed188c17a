"""A model learns from traces of its own decoding to write the same text in fewer forwards: 4x4 Sudoku.

python examples/train_traces.py               # a few steps: quick, and hardly a board is right
python examples/train_traces.py --steps 300   # most boards are right

`relay-hf traces` and `relay-hf train --objective traces` do the same for a model and prompts of yours.
"""

import argparse
import tempfile
from typing import Any

from datasets import Dataset

from relay_hf.tasks.sudoku import (
    augment_puzzles,
    evaluate_sudoku,
    generate_puzzles,
    make_sudoku_tokenizer,
    split_puzzles,
    to_features,
)
from relay_hf.testing import tiny_model
from relay_hf.traces import TASKS, decode_traces
from relay_hf.trainers import RelayTrainer, RelayTrainerConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
arguments = parser.parse_args()

tokenizer = make_sudoku_tokenizer(4)
puzzles = split_puzzles(generate_puzzles(200, size=4, progress=False), test_count=40)
sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "initializer_range": 0.02}
model = tiny_model(tokenizer, text=sizes, block_size=None)


def train(rows: Dataset, **options: Any) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        config = RelayTrainerConfig(
            scratch,
            max_steps=arguments.steps,
            per_device_train_batch_size=64,
            logging_steps=max(arguments.steps // 2, 1),
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            **options,
        )
        RelayTrainer(model, config, train_dataset=rows, processing_class=tokenizer).train()
    print(evaluate_sudoku(model, tokenizer, puzzles["test"], threshold=0.15, progress=False))


shown = augment_puzzles(puzzles["train"], rows=64 * arguments.steps)
train(to_features(shown, tokenizer), objective="masked", learning_rate=2e-3)

# The model solves puzzles itself, surely and slowly, and its legal boards are kept.
task = TASKS["sudoku"](tokenizer, model.config)
rows = [{"question": question} for question in shown["question"][:512]]
traces = decode_traces(model, [task.prompt(row) for row in rows], {"unmasking_threshold": 0.05})
legal = [trace for trace, is_right in zip(traces, task.are_right(rows, traces), strict=True) if is_right] or traces
print(f"{len(legal)} of {len(rows)} traces; the first reveals its blanks in the steps {legal[0].reveal_steps}")

# One step of training follows two of a trace, with the state that the step before has left.
columns = ("input_ids", "labels", "reveal_steps")
own = Dataset.from_list([{name: getattr(trace, name) for name in columns} for trace in legal])
train(own, objective="traces", trace_stride=2, learning_rate=5e-4, relay_learning_rate=1e-2)
