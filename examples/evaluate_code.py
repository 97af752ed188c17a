"""HumanEval on a relay model with its relay and without: accuracy, forwards, what chance explains, the card.

python examples/evaluate_code.py                                  # a tiny random model and three problems
python examples/evaluate_code.py --model PATH_OR_ID --limit 164   # yours, with all problems

Needs `pip install 'relay-hf[code-eval]'`. On the command line: `relay-hf eval`, `relay-hf compare` and
`relay-hf card`, see docs/evaluation.md. Answers are run as programs, in a sandbox.
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from relay_hf import RelayForMaskedDiffusion
from relay_hf.evaluation import CodeEvalArguments, add_runs, compare_runs, evaluate_code, format_table
from relay_hf.testing import CHAT_TEMPLATE, byte_tokenizer, tiny_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="checkpoint to load, with its tokenizer")
parser.add_argument("--limit", type=int, default=3, help="number of problems")
parser.add_argument("--thresholds", type=float, nargs="+", default=[0.1, 0.9])
arguments = parser.parse_args()


if arguments.model:
    model = RelayForMaskedDiffusion.from_pretrained(arguments.model, device_map="auto").eval()
    tokenizer, longest = AutoTokenizer.from_pretrained(arguments.model), 512
else:
    tokenizer, longest = byte_tokenizer(chat_template=CHAT_TEMPLATE), 64
    model = tiny_model(tokenizer, text={"max_position_embeddings": 4096}, block_size=16, token_shift=True)

with tempfile.TemporaryDirectory() as name:
    folders = {}
    for label, options in {"without relay": '{"use_relay": false}', "with relay": "{}"}.items():
        folders[label] = str(Path(name) / label)
        evaluation = CodeEvalArguments(
            output_dir=folders[label], thresholds=arguments.thresholds, limit=arguments.limit, max_new_tokens=longest,
            generation_options=options,
        )  # fmt: skip
        print(f"{label}\n{format_table(evaluate_code(model, tokenizer, evaluation, label))}\n")
    print("A: without relay, B: with relay\n" + compare_runs(*folders.values()))
    if not arguments.model:
        folder = Path(name) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print("\n" + add_runs(folder, [Path(folders["with relay"]), Path(folders["without relay"])]).read_text())
