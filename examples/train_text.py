"""Puts a relay on a causal decoder and trains it on prompts and completions, in full or with LoRA.

python examples/train_text.py                                # a tiny random Qwen2: seconds
python examples/train_text.py --lora
python examples/train_text.py --base Qwen/Qwen2.5-0.5B --mask-token-id 151665 --data rows.jsonl --steps 200
"""

import argparse
import tempfile
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from relay_hf import RelayForMaskedDiffusion
from relay_hf.testing import byte_tokenizer, tiny_decoder
from relay_hf.trainers import RelayTrainer, RelayTrainerConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", help="causal decoder to start from, with its tokenizer")
parser.add_argument("--mask-token-id", type=int, default=258)
parser.add_argument("--data", help="JSON lines with `prompt` and `completion`")
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--lora", action="store_true", help="train adapters; the channel is trained in full either way")
parser.add_argument("--output", default=None, help="folder for checkpoints and the model")
arguments = parser.parse_args()


def tiny_base(folder: Path) -> tuple[str, PreTrainedTokenizerBase]:
    """A random Qwen2 of two layers and a tokenizer with one token a byte."""
    tokenizer = byte_tokenizer()
    tiny_decoder(tokenizer).save_pretrained(folder)
    return str(folder), tokenizer


with tempfile.TemporaryDirectory() as scratch:
    if arguments.base:
        base, tokenizer = arguments.base, AutoTokenizer.from_pretrained(arguments.base)
    else:
        base, tokenizer = tiny_base(Path(scratch) / "base")
    # A causal checkpoint loads with a fresh channel: blocks of 32, token shift, an exact no-op until it is trained.
    model = RelayForMaskedDiffusion.from_pretrained(base, mask_token_id=arguments.mask_token_id, dtype="float32")
    if arguments.data:
        dataset = load_dataset("json", data_files=arguments.data, split="train")
    else:
        sums = [{"prompt": f"{a} + {b} = ", "completion": str(a + b)} for a in range(10) for b in range(10)]
        dataset = Dataset.from_list(sums)

    trainer = RelayTrainer(
        model,
        RelayTrainerConfig(
            arguments.output or str(Path(scratch) / "run"),
            objective="relay",
            rollout_steps=2,
            unmasking_threshold=0.85,
            learning_rate=1e-4,
            relay_learning_rate=1e-3,
            ema_decay=0.99,
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            logging_steps=2,
            save_steps=max(arguments.steps // 2, 1),
            report_to=[],
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM") if arguments.lora else None,
    )
    trainer.train()
    # Two steps more, from the last checkpoint on, with its buffer and its averages.
    trainer.args.max_steps += 2
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    print("saved:", ", ".join(sorted(path.name for path in Path(trainer.args.output_dir).iterdir())))
