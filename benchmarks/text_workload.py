"""Text as a study's workload: an account's movements in the prompt, its balance after each in the reply.

A small language model with blocks, token shift and sub-blocks reads and writes bytes.

    python benchmarks/text_workload.py 2000 prompts.jsonl     # `prompt` and `answer` of training, for other tools

    prompt: BcCAaCbBcacccCBc        reply: 2034364632000352

"A", "B", "C" put 1 to 3 in, "a", "b", "c" take 1 to 3 out, and a balance stays between 0 and 9. That makes every digit
depend on the one before it: no sum of the movements gives it.
"""

import json
import random
import sys
import zlib
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Qwen2Config

from relay_hf import RelayForMaskedDiffusion
from relay_hf.modeling import RelayConfig
from relay_hf.testing import byte_tokenizer
from relay_hf.trainers.objectives import RECIPES

BLOCK, SUB_BLOCK = 16, 8
MOVEMENTS = {"A": 1, "B": 2, "C": 3, "a": -1, "b": -2, "c": -3}


@dataclass(frozen=True)
class TextSizes:
    """Sizes of a study of text: `size` movements per prompt, `test_puzzles` held-out prompts."""

    size: int = 16
    test_puzzles: int = 500
    steps: int = 100
    warmup_steps: int = 500
    batch_size: int = 64
    hidden_size: int = 64
    layers: int = 2


class Balances:
    """Prompts and replies; attributes as those of `Boards`.

    Args:
        sizes: of `TextSizes`.
    """

    title, unit = "Balances as text", "reply"
    thresholds = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3)
    forwards = (3.0, 4.0, 6.0, 8.0, 10.0)
    levels = (50.0, 60.0, 70.0, 80.0)
    check, careful = "answer", {"unmasking_threshold": 0.95}

    def __init__(self, **sizes: Any) -> None:
        own = self.sizes = TextSizes(**sizes)
        self.steps, self.warmup_steps, self.test_rows = own.steps, own.warmup_steps, own.test_puzzles
        self.tokenizer = byte_tokenizer()

    def new_model(self, config: dict[str, Any], **sizes: Any) -> RelayForMaskedDiffusion:
        """A random model; `config` completes its configuration, `sizes` replace its own."""
        own = replace(self.sizes, **sizes)
        text_config = Qwen2Config(
            vocab_size=len(self.tokenizer),
            hidden_size=own.hidden_size,
            intermediate_size=4 * own.hidden_size,
            num_hidden_layers=own.layers,
            num_attention_heads=own.hidden_size // 32,
            num_key_value_heads=own.hidden_size // 32,
            max_position_embeddings=max(2 * own.size, BLOCK),
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=None,
        )
        mask = self.tokenizer.mask_token_id
        model = RelayForMaskedDiffusion(
            RelayConfig(text_config=text_config, block_size=BLOCK, token_shift=True, mask_token_id=mask, **config)
        )
        model.generation_config.update(max_new_tokens=own.size, sub_block_size=SUB_BLOCK, unmasking_threshold=0.9)
        return model

    def options(self, objective: str, from_scratch: bool) -> dict[str, Any]:
        """Options of the trainer; a channel opens at a rate of its own within a hundred steps."""
        return {
            "objective": objective,
            "rollout_steps": 2,
            "learning_rate": 3e-3 if from_scratch else 7.5e-4,
            "relay_learning_rate": None if RECIPES[objective].carry == "nothing" else 1e-2,
            "unmasking_threshold": 0.9,
            "sub_block_size": SUB_BLOCK,
            "clean_block_starts": True,  # there is no base model that knows them
            "per_device_train_batch_size": self.sizes.batch_size,
            "ema_decay": 0.99,
        }

    def asked(self, count: int, seed: int, held_out: bool = False) -> list[dict[str, str]]:
        """Rows with `prompt` and `answer`. A checksum decides which prompts are held out: one in ten."""
        draw, rows = random.Random(seed), []
        while len(rows) < count:
            prompt = "".join(draw.choices("ABCabc", k=self.sizes.size))
            if (zlib.crc32(prompt.encode()) % 10 == 0) == held_out:
                balances = accumulate((MOVEMENTS[letter] for letter in prompt), next_balance, initial=0)
                rows.append({"prompt": prompt, "answer": "".join(map(str, [*balances][1:]))})
        return rows

    def tokens(self, rows: list[dict[str, str]]) -> tuple[list[list[int]], list[list[int]]]:
        """Ids of the prompts, and of the replies."""
        asked, answered = ([row[column] for row in rows] for column in ("prompt", "answer"))
        return self.tokenizer(asked)["input_ids"], self.tokenizer(answered)["input_ids"]

    def texts(self, count: int, seed: int) -> Dataset:
        """Training rows; prompts are not learned."""
        asked, answered = self.tokens(self.asked(count, seed))
        labels = [[-100] * self.sizes.size + reply for reply in answered]
        return Dataset.from_dict({"input_ids": [a + b for a, b in zip(asked, answered, strict=True)], "labels": labels})

    def evaluate(
        self, model: RelayForMaskedDiffusion, threshold: float, count: int | None = None, **options: Any
    ) -> dict[str, float]:
        """Mean denoise `forwards`, shares of `exact` replies and of right `digits`, of `count` held-out prompts."""
        rows = self.asked(min(count or self.test_rows, self.test_rows), seed=0, held_out=True)
        asked, right = (torch.tensor(ids, device=model.device) for ids in self.tokens(rows))
        output = model.eval().generate(
            asked,
            attention_mask=torch.ones_like(asked),
            unmasking_threshold=threshold,
            eos_token_id=None,  # replies have one length
            return_dict_in_generate=True,
            **options,
        )
        same = output.sequences[:, asked.shape[1] :] == right  # (rows, positions)
        forwards = output.denoise_forwards.float().mean().item()
        return {"forwards": forwards, "exact": same.all(1).float().mean().item(), "digits": same.float().mean().item()}


def next_balance(balance: int, movement: int) -> int:
    return min(max(balance + movement, 0), 9)


if __name__ == "__main__":
    asked = Balances().asked(int(sys.argv[1]), seed=10_000)
    Path(sys.argv[2]).write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
