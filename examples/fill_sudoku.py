"""A model without blocks fills in the masks of a canvas: trains on 4x4 Sudoku for a moment and solves one.

python examples/fill_sudoku.py               # a few steps: quick, and mostly wrong
python examples/fill_sudoku.py --steps 300   # mostly right
"""

import argparse
import tempfile

from relay_hf.tasks.sudoku import (
    augment_puzzles,
    evaluate_sudoku,
    generate_puzzles,
    make_sudoku_tokenizer,
    split_puzzles,
    to_features,
)
from relay_hf.testing import tiny_model
from relay_hf.trainers import RelayTrainer, RelayTrainerConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
arguments = parser.parse_args()

tokenizer = make_sudoku_tokenizer(4)
puzzles = split_puzzles(generate_puzzles(200, size=4, progress=False), test_count=40)
sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "initializer_range": 0.02}
model = tiny_model(tokenizer, text=sizes, block_size=None)

with tempfile.TemporaryDirectory() as scratch:
    RelayTrainer(
        model,
        RelayTrainerConfig(
            scratch,
            objective="masked",
            max_steps=arguments.steps,
            per_device_train_batch_size=64,
            learning_rate=2e-3,
            logging_steps=max(arguments.steps // 4, 1),
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=to_features(augment_puzzles(puzzles["train"], rows=64 * arguments.steps), tokenizer),
        processing_class=tokenizer,
    ).train()

question = puzzles["test"][0]["question"]
output = model.generate(**tokenizer(question, return_tensors="pt"), return_dict_in_generate=True)
print("puzzle:", question)
print("filled:", tokenizer.decode(output.sequences[0]), "in", int(output.denoise_forwards[0]), "denoise forwards")
print(evaluate_sudoku(model, tokenizer, puzzles["test"], threshold=0.15, progress=False))
