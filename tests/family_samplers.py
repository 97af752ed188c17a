"""What the families' own samplers write on tiny weights, and the options with which `generate` writes the same.

`python -m tests.family_samplers` prints the table of docs/converting.md.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from relay_hf import RelayForMaskedDiffusion, RelayGenerateOutput

FOLDER = Path(__file__).parent / "reference_families"


@dataclass
class Sampled:
    """One row of a family's `cases.json`: what its sampler wrote, and the options that ask `generate` for the same."""

    family: str
    sampler: str
    case: dict[str, Any]
    options: dict[str, Any]

    def decode(self) -> RelayGenerateOutput:
        return load(self.family).generate(
            torch.tensor(self.case["prompt"])[None],
            max_new_tokens=self.case["new_tokens"],
            use_relay=False,
            return_dict_in_generate=True,
            output_history=True,
            **{"eos_token_id": self.case.get("stop_token"), **self.options},
        )

    def expected_forwards(self, output: RelayGenerateOutput) -> int | None:
        """Of the family in our terms; None if it does not count them."""
        return FORWARDS[self.family](self, output) if self.case["forwards"] else None

    def is_equal(self) -> bool:
        output = self.decode()
        forwards = int(output.denoise_forwards + output.commit_forwards + output.prefill_forwards)
        is_same = output.sequences[0].tolist() == self.case["tokens"]
        return is_same and self.expected_forwards(output) in (None, forwards)

    def is_right(self) -> bool:
        """Whether the family's sampler does as it says.

        SDAR's static strategy, and its dynamic one if too few positions are above the threshold, takes the best so many
        of the block even if fewer are hidden, and writes over what is known. With top_k=1 all positions of a block are
        equally sure, and the static strategy takes those that torch.topk happens to return.
        """
        if self.family != "sdar_b8" or self.case["strategy"] == "sequential":
            return True
        if self.case["sampling"] == "topk1":
            return self.case["strategy"] == "low_confidence_dynamic"
        return not self.overwrites(self.decode())

    def overwrites(self, output: RelayGenerateOutput) -> bool:
        """Whether a step of SDAR's has fewer hidden positions than it wants to reveal: from there on texts differ."""
        size, steps, start = self.case["block"], self.case["denoising_steps"], len(self.case["prompt"])
        wanted = [size // steps + (step < size % steps) for step in range(steps)]
        at = torch.cat([torch.zeros(start), output.history.revealed_at[0, start:]])
        for block in at.split(size):
            taken = block[block > 0].unique(return_counts=True)[1].tolist()
            hidden = [sum(taken[step:]) for step in range(len(taken))]
            if any(left < want for left, want in zip(hidden, wanted, strict=False)):
                return True
        return False


@cache
def load(family: str) -> RelayForMaskedDiffusion:
    return RelayForMaskedDiffusion.from_pretrained(FOLDER / family / "checkpoint")


def of_llada(case: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    size = case["block_length"]
    if case["steps"] is not None:
        steps = case["steps"] * size // case["new_tokens"]
        return case["sampler"], {"unmasking_policy": "fixed_count", "denoising_steps": steps, "sub_block_size": size}
    cached = {"threshold": False, "threshold, dual cache": True, "threshold, prefix cache": "prefix"}[case["sampler"]]
    return case["sampler"], {
        "unmasking_policy": "confidence_threshold",
        "unmasking_threshold": case["threshold"],
        "sub_block_size": size,
        "use_sub_block_cache": cached,
    }


def of_dream(case: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    orders = {"maskgit_plus": "confidence", "entropy": "entropy", "topk_margin": "margin"}
    if case["algorithm"] in orders:
        return case["algorithm"], {
            "unmasking_policy": "time_schedule",
            "unmasking_order": orders[case["algorithm"]],
            "denoising_steps": case["steps"],
        }
    threshold = {"unmasking_policy": "confidence_threshold", "unmasking_threshold": case["options"]["threshold"]}
    if "block_length" not in case["options"]:
        # Whatever the threshold, it reveals the share of a step: as many steps as tokens are one token a step.
        return "confidence_threshold, whole", {
            "unmasking_policy": "fixed_count", "denoising_steps": case["steps"],
        }  # fmt: skip
    cached = True if case["options"]["dual_cache"] else "prefix"
    return f"confidence_threshold, {'dual' if cached is True else 'prefix'} cache", {
        **threshold, "sub_block_size": case["options"]["block_length"], "use_sub_block_cache": cached,
    }  # fmt: skip


def of_sdar(case: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    options: dict[str, Any] = {"denoising_steps": case["denoising_steps"], "unmasking_policy": "fixed_count"}
    if case["strategy"] == "low_confidence_dynamic":
        options |= {"unmasking_policy": "confidence_threshold", "unmasking_threshold": case["threshold"]}
    if case["strategy"] == "sequential":
        options["unmasking_order"] = "left_to_right"
    if case["sampling"] == "topk1":
        options |= {"do_sample": True, "top_k": 1}
    return f"{case['strategy']}, {case['sampling']}", options


def of_fast_dllm_v2(case: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return f"{case['function']}{', block cache' if case['block_cache'] else ''}", {
        "unmasking_threshold": case["threshold"],
        "sub_block_size": case["sub_block"],
        "use_sub_block_cache": case["block_cache"],
    }


def as_counted(sampled: Sampled, output: RelayGenerateOutput) -> int:
    return sampled.case["forwards"]


def of_llada_with_cache(sampled: Sampled, output: RelayGenerateOutput) -> int:
    """Its samplers with a cache count one forward more for a block that is known after its first."""
    if "cache" not in sampled.sampler:
        return sampled.case["forwards"]
    blocks = output.history.revealed_at[0, len(sampled.case["prompt"]) :].split(sampled.case["block_length"])
    return sampled.case["forwards"] - sum(int(block.unique().numel() == 1) for block in blocks)


def without_last_commit(sampled: Sampled, output: RelayGenerateOutput) -> int:
    """SDAR commits every block, also the last, which nothing reads."""
    return sampled.case["forwards"] - 1


FAMILIES: dict[str, Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "llada_gqa": of_llada,
    "dream": of_dream,
    "sdar_b8": of_sdar,
    "fast_dllm_v2_b8": of_fast_dllm_v2,
}
FORWARDS: dict[str, Callable[[Sampled, RelayGenerateOutput], int]] = {
    **dict.fromkeys(FAMILIES, as_counted),
    "llada_gqa": of_llada_with_cache,
    "sdar_b8": without_last_commit,
}


def read_samples(folder: Path = FOLDER) -> list[Sampled]:
    samples = []
    for family, options_of in FAMILIES.items():
        for case in json.loads((folder / family / "cases.json").read_text()):
            sampler, options = options_of(case)
            samples.append(Sampled(family, sampler, case, options))
    return samples


def main() -> None:
    logging.set_verbosity_error()
    counts: dict[tuple[str, str], list[int]] = {}
    for sampled in read_samples():
        count = counts.setdefault((sampled.family, sampled.sampler), [0, 0, 0])
        right = sampled.is_right()
        for place, hit in enumerate((right and sampled.is_equal(), right, True)):
            count[place] += hit
    print("| family | sampler | equal | family is right | cases |\n|---|---|---|---|---|")
    for (family, sampler), numbers in counts.items():
        print(f"| `{family}` | {sampler} | {' | '.join(map(str, numbers))} |")


if __name__ == "__main__":
    main()
