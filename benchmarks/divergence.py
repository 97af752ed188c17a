"""How far the shortcuts of decoding lead away from exact decoding, asked of a trained model.

    python benchmarks/divergence.py              # first trains a byte-level model on the documentation of Python
    python benchmarks/divergence.py --model DIR  # of an earlier run with `--save DIR`

Held-out prompts are continued greedily: exactly, with the sub-block cache, with fused commits, and with both. For each
way: forwards per text, the share of tokens that equal the exact ones, how many tokens come before the first that does
not, and the model's own bound of the continuation's log-likelihood (relay_hf/evaluation/likelihood.py), which says
whether a different text is a worse one. The last line is one JSON object.
"""

import argparse
import json
import platform
import tempfile
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config

from relay_hf import RelayConfig, RelayForMaskedDiffusion, RelayTrainer, RelayTrainerConfig
from relay_hf.evaluation import LikelihoodBound
from relay_hf.testing import byte_tokenizer

PROMPT, NEW, ROW = 96, 96, 256
WAYS = {
    "exact": {},
    "sub-block cache": {"use_sub_block_cache": True},
    "fused commits": {"fuse_commits": True},
    "both": {"use_sub_block_cache": True, "fuse_commits": True},
}


def rows_of_text() -> tuple[list[str], list[str]]:
    """Rows to train on, and rows of other topics."""
    training, held_out = [], []
    for number, name in enumerate(sorted(topics)):
        text = topics[name].encode("ascii", "ignore").decode()
        rows = [text[begin : begin + ROW] for begin in range(0, len(text) - ROW + 1, ROW)]
        (held_out if number % 10 == 0 else training).extend(rows)
    return training, held_out


def train(rows: list[str], tokenizer: PreTrainedTokenizerFast, steps: int) -> RelayForMaskedDiffusion:
    torch.manual_seed(0)
    backbone = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=6, pad_token_id=tokenizer.pad_token_id, eos_token_id=None,
    )  # fmt: skip
    model = RelayForMaskedDiffusion(RelayConfig.fast_dllm_v2(backbone, mask_token_id=tokenizer.mask_token_id))
    with tempfile.TemporaryDirectory() as scratch:
        for objective, share in (("complementary", 0.75), ("relay", 0.25)):
            arguments = RelayTrainerConfig(
                scratch, objective=objective, max_steps=round(steps * share), per_device_train_batch_size=16,
                learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=20, max_length=ROW, sub_block_size=None,
                save_strategy="no", logging_steps=50, report_to=[], bf16=False,
            )  # fmt: skip
            trainer = RelayTrainer(
                model, arguments, train_dataset=Dataset.from_dict({"text": rows}), processing_class=tokenizer
            )
            trainer.train()
    return model.eval()


def compare(model: RelayForMaskedDiffusion, prompts: Tensor, threshold: float) -> dict:
    bound = LikelihoodBound(model, samples=16)
    results, exact = {}, None
    for way, options in WAYS.items():
        output = model.generate(
            prompts, max_new_tokens=NEW, sub_block_size=8, unmasking_threshold=threshold, eos_token_id=None,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        new = output.sequences[:, PROMPT:]
        exact = new if exact is None else exact
        agrees = new == exact
        requests = list(zip(prompts.tolist(), new.tolist(), strict=True))
        results[way] = {
            "denoise_forwards": output.denoise_forwards.float().mean().item(),
            "commit_forwards": output.commit_forwards.float().mean().item(),
            "tokens_agree": agrees.float().mean().item(),
            "tokens_before_first_difference": agrees.long().cumprod(-1).sum(-1).float().mean().item(),
            "bound_in_nats_per_token": sum(value for _, value in bound(requests)) / new.numel(),
        }
        print(f"{way}: {json.dumps(results[way])}", flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--threshold", type=float, default=0.85)
    parser.add_argument("--model", help="folder of a model that was saved before")
    parser.add_argument("--save", help="folder for the trained model")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer, (training, held_out) = byte_tokenizer(), rows_of_text()
    if arguments.model:
        model = RelayForMaskedDiffusion.from_pretrained(arguments.model).eval()
    else:
        model = train(training, tokenizer, arguments.steps)
    if arguments.save:
        model.save_pretrained(arguments.save)
    chosen = held_out[:: max(len(held_out) // arguments.prompts, 1)][: arguments.prompts]
    rows = torch.tensor(tokenizer(chosen).input_ids)
    results = compare(model, rows[:, :PROMPT], arguments.threshold)
    texts = [(row[:PROMPT], row[PROMPT : PROMPT + NEW]) for row in rows.tolist()]
    real = sum(value for _, value in LikelihoodBound(model, samples=16)(texts)) / (len(texts) * NEW)
    print(json.dumps({**results, "bound_of_the_real_text": real, **vars(arguments), "torch": torch.__version__,
                      "machine": platform.machine()}))  # fmt: skip
