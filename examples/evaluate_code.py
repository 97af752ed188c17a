"""HumanEval on a relay model with its relay and without: accuracy, forwards, what chance explains, the card.

python examples/evaluate_code.py                                  # a tiny random model and three problems
python examples/evaluate_code.py --model PATH_OR_ID --limit 164   # yours, with all problems

Needs `pip install 'relay-hf[code-eval]'`. On the command line: `relay-hf eval`, `relay-hf compare` and
`relay-hf card`, see docs/evaluation.md. Answers are run as programs, in a sandbox.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.evaluation import CodeEvalArguments, add_runs, compare_runs, evaluate_code, format_table

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="checkpoint to load, with its tokenizer")
parser.add_argument("--limit", type=int, default=3, help="number of problems")
parser.add_argument("--thresholds", type=float, nargs="+", default=[0.1, 0.9])
arguments = parser.parse_args()


def tiny_model() -> tuple[RelayForMaskedDiffusion, PreTrainedTokenizerFast]:
    """A random model of bytes, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]", mask_token="[MASK]"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}[EOS]{% endfor %}"
    torch.manual_seed(0)
    backbone = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=tokenizer.pad_token_id, initializer_range=0.2,
    )  # fmt: skip
    config = RelayConfig(
        text_config=backbone, block_size=16, mask_token_id=tokenizer.mask_token_id, token_shift=True, relay_init="ones"
    )
    return RelayForMaskedDiffusion(config).eval(), tokenizer


if arguments.model:
    model = RelayForMaskedDiffusion.from_pretrained(arguments.model, device_map="auto").eval()
    tokenizer, longest = AutoTokenizer.from_pretrained(arguments.model), 512
else:
    (model, tokenizer), longest = tiny_model(), 64

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
