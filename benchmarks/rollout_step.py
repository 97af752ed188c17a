"""Time and memory of a training step: the rollout engine against other ways to train.

    python benchmarks/rollout_step.py                 # against the doubled sequence, over a buffer lifetime
    python benchmarks/rollout_step.py --scaling       # K = 1, 2, 4, 8, with and without checkpointing, over `masked`
    python benchmarks/rollout_step.py --against sft   # `relay` against `complementary`, the plain fine-tuning
    python benchmarks/rollout_step.py --length 512 1024 2048 4096   # the first length as above, then growth with length

Everything that is compared runs in one process, in turns; medians are reported. Memory is the peak of a process that
makes one step, less that of an idle process with the same imports. The last line is one JSON object.

"published" is the doubled sequence as published: [x_t ; x_0] in every step, logits and softmax of every noisy position,
and one more loss over all labels, which the published code computes and drops. "plain" is the same without that loss.
"""

import argparse
import json
import math
import platform
from dataclasses import replace

import torch
from rollout_workload import Workload, median_seconds

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--scaling", action="store_true", help="how time and memory grow with K")
parser.add_argument("--against", choices=["doubled", "sft"], default="doubled")
parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 151_936])
parser.add_argument("--length", type=int, nargs="+", default=[Workload.length])
for name in ("hidden", "layers", "prompt", "batch", "steps", "threads"):
    parser.add_argument(f"--{name}", type=int, default=getattr(Workload, name))
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--no-memory", action="store_true")


def against_doubled(base: Workload, repeats: int, weigh: bool) -> dict:
    """Totals over a buffer lifetime: from all blocks active down to one."""
    sides = {name: replace(base, denoiser=name) for name in ("published", "plain", "engine")}
    median_seconds({"warm": replace(base, active_blocks=1)}, 1)
    totals, speedups = dict.fromkeys(sides, 0.0), {}
    for count in range(base.blocks, 0, -1):
        seconds = median_seconds({name: replace(side, active_blocks=count) for name, side in sides.items()}, repeats)
        totals = {name: totals[name] + seconds[name] for name in sides}
        speedups[count] = seconds["published"] / seconds["engine"]
        print(f"vocabulary {base.vocab}, {count:2d} active blocks: " + ", ".join(
            f"{name} {value:.3f} s" for name, value in seconds.items()) + f"; speedup {speedups[count]:.2f}", flush=True
        )  # fmt: skip
    result = {
        "speedup": totals["published"] / totals["engine"],
        "speedup_all_active": speedups[base.blocks],
        "speedup_against_plain": totals["plain"] / totals["engine"],
    }
    if weigh:
        peaks = {name: side.peak_mebibytes() for name, side in sides.items()}
        result["memory_ratio"] = peaks["engine"] / peaks["published"]
        result["memory_ratio_against_plain"] = peaks["engine"] / peaks["plain"]
        result["mebibytes"] = peaks
    return result


def scaling(base: Workload, repeats: int, weigh: bool) -> dict:
    """Time and memory for K = 1, 2, 4, 8, all blocks active at first, and time beside one step of `masked`."""
    result: dict = {}
    for checkpointing in (False, True):
        workloads = {str(k): replace(base, steps=k, checkpointing=checkpointing) for k in (1, 2, 4, 8)}
        median_seconds({"warm": workloads["1"]}, 1)
        masked = replace(workloads["1"], objective="masked")
        seconds = median_seconds({**workloads, "masked": masked}, repeats)
        peaks = {k: workload.peak_mebibytes() for k, workload in workloads.items()} if weigh else {}
        name = "checkpointing" if checkpointing else "plain"
        result[name] = {"seconds": seconds, "mebibytes": peaks, "time_8_over_2": seconds["8"] / seconds["2"]}
        result[name]["time_over_masked"] = {k: seconds[k] / seconds["masked"] for k in workloads}
        if weigh:
            result[name]["memory_8_over_2"] = peaks["8"] / peaks["2"]
        print(name, result[name], flush=True)
    if weigh:
        windowed = replace(base, steps=8, window=2)
        result["window_2"] = {"mebibytes": {"8": windowed.peak_mebibytes()}}
    return result


def against_sft(base: Workload, repeats: int, weigh: bool) -> dict:
    """`relay` with K = 2 against a mask and its complement, ours and the published one, on the same tokens."""
    sides = {
        "relay": replace(base, objective="relay"),
        "complementary": replace(base, objective="complementary"),
        "complementary, one view at a time": replace(base, objective="complementary", window=1),
        "complementary, published": replace(base, objective="complementary", denoiser="published"),
    }
    median_seconds({"warm": sides["relay"]}, 1)
    seconds = median_seconds(sides, repeats)
    result: dict = {"time_ratio": seconds["relay"] / seconds["complementary"], "seconds": seconds}
    if weigh:
        peaks = {name: side.peak_mebibytes() for name, side in sides.items()}
        result |= {
            "memory_ratio": peaks["relay"] / peaks["complementary"],
            "memory_ratio_against_published": peaks["relay"] / peaks["complementary, published"],
            "mebibytes": peaks,
        }
    return result


def growth(base: Workload, lengths: list[int], repeats: int, weigh: bool) -> dict:
    """Time and memory of a step at each length, all blocks active; growth is the exponent of the length in between."""
    rows: list[dict] = []
    for length in lengths:
        sides = {name: replace(base, denoiser=name, length=length) for name in ("plain", "engine")}
        median_seconds({"warm": replace(sides["engine"], active_blocks=1)}, 1)
        row = {"length": length, "seconds": median_seconds(sides, repeats)}
        if weigh:
            row["mebibytes"] = {name: side.peak_mebibytes() for name, side in sides.items()}
        for kind in [kind for kind in ("seconds", "mebibytes") if kind in row]:
            row[f"{kind}_ratio"] = row[kind]["plain"] / row[kind]["engine"]
            if rows:
                before, longer = rows[-1], math.log(length / rows[-1]["length"])
                row[f"{kind}_growth"] = {n: math.log(row[kind][n] / before[kind][n]) / longer for n in sides}
        rows.append(row)
        print(f"vocabulary {base.vocab}, growth: {json.dumps(row)}", flush=True)
    return {"vocabulary": base.vocab, "lengths": rows}


if __name__ == "__main__":
    arguments = parser.parse_args()
    names = ("hidden", "layers", "prompt", "batch", "steps", "threads")
    settings = {"length": arguments.length[0], **{name: getattr(arguments, name) for name in names}}
    measure = scaling if arguments.scaling else against_sft if arguments.against == "sft" else against_doubled
    results = {}
    for vocab in arguments.vocab:
        workload = Workload(vocab=vocab, **settings)
        results[vocab] = measure(workload, arguments.repeats, weigh=not arguments.no_memory)
        print(f"vocabulary {vocab}: {json.dumps(results[vocab])}", flush=True)
    grown = {}
    if len(arguments.length) > 1:
        # The logits of a large vocabulary, which the doubled sequence holds, would hide how attention grows.
        smallest = Workload(vocab=min(arguments.vocab), **settings)
        grown = {"growth": growth(smallest, arguments.length, arguments.repeats, not arguments.no_memory)}
    environment = {"machine": platform.machine(), "torch": torch.__version__, "repeats": arguments.repeats}
    print(json.dumps({**results[arguments.vocab[-1]], "by_vocabulary": results, **grown, **settings, **environment}))
