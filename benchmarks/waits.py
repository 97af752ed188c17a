"""How often decoding and training wait for the device, and how many kernels they launch, counted on the test device.

    python -m tests.device.fakegpu                      # builds the device: half a minute, needs g++
    python benchmarks/waits.py                          # this checkout
    python benchmarks/waits.py --against OTHER_CHECKOUT # before and after, which may be an older commit

Counts do not depend on the machine, on the width of the model or on its weights: 28 layers of width 32 launch what the
28 layers of a Qwen2 of 1.5B parameters do. Decoding in bf16, training in bf16 autocast without checkpointing; attention
is one launch each way. "all" is a `generate` of 48 tokens, everything divided by its denoise steps, which reveal one
token of each row. Two and three layers are counted, and the others follow; only with the sub-block cache do weights
decide what a step runs. The last line is one JSON object. Two minutes on one core for a checkout.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DECODING_COLUMNS = {
    "waits per start": ("start", "waits"),
    "per block": ("block", "waits"),
    "per step": ("step", "waits"),
    "all": ("all", "waits"),
    "launches per step": ("step", "launches"),
    "all, launches": ("all", "launches"),
}
TRAINING_COLUMNS = {
    "waits per step": ("step", "waits"),
    "a logged step adds": ("logging", "waits"),
    "launches per step": ("step", "launches"),
}


def measure(layers: int) -> dict[str, dict[str, Any]]:
    """All costs of a model, in this process; every layer costs the same, so that two and three of them are counted."""
    two, three = count(2), count(3)
    return {
        kind: {
            case: {
                part: vars(cost.plus(three[kind][case][part].plus(cost, -1), layers - 2).rounded())
                for part, cost in parts.items()
            }
            for case, parts in cases.items()
        }
        for kind, cases in two.items()
    }


def count(layers: int) -> dict[str, dict[str, dict[str, Any]]]:
    """All costs: by decoding or training, case, and part."""
    import datasets
    import pytest
    import torch
    from transformers.utils import logging

    from tests.device import costs, fakegpu

    fakegpu.load()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    decoding = {}
    for name in costs.DECODING:
        for channel in costs.CHANNELS if name in costs.BATCHES else ["layer_norm"]:
            model = costs.build_model(layers, channel, torch.bfloat16).eval()
            with contextlib.suppress(ValueError):  # an older checkout refuses the options
                decoding[f"{name}, {channel}"] = costs.decoding_costs(model, name)
    training = {}
    with pytest.MonkeyPatch.context() as patch:
        fakegpu.default_to(fakegpu.NAME, patch)
        for objective, numbers in costs.OBJECTIVES.items():
            for steps in numbers:
                case = objective if steps is None else f"{objective}, K = {steps}"
                training[case] = costs.training_costs(layers, objective, steps)
    return {"decoding": decoding, "training": training}


def measure_in(checkout: Path, layers: int) -> dict[str, dict[str, Any]]:
    """What a process counts that imports `relay_hf` from a checkout, and the test device from this one."""
    command = [sys.executable, __file__, "--worker", str(checkout), "--layers", str(layers)]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def table(columns: dict[str, tuple[str, str]], before: dict[str, Any] | None, after: dict[str, Any]) -> str:
    """Markdown, with what it was and what it is in one cell where these differ."""

    def cell(case: str, part: str, kind: str) -> str:
        new = after[case][part][kind]
        old = new if before is None or case not in before else before[case][part][kind]
        return f"{new:g}" if old == new else f"{old:g} → {new:g}"

    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {case} | " + " | ".join(cell(case, *column) for column in columns.values()) + " |" for case in after]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="folder of another checkout, counted first")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        sys.path.insert(0, str(arguments.worker.resolve()))
        import relay_hf  # noqa: F401  the other checkout's, and only this, before `tests` is looked for here

        sys.path.insert(0, str(ROOT))
        print(json.dumps(measure(arguments.layers)))
        return
    before = None if arguments.against is None else measure_in(arguments.against, arguments.layers)
    after = measure_in(ROOT, arguments.layers)
    for part, columns in (("decoding", DECODING_COLUMNS), ("training", TRAINING_COLUMNS)):
        print(table(columns, before and before[part], after[part]), end="\n\n")
    print(json.dumps({"layers": arguments.layers, "before": before, "after": after}))


if __name__ == "__main__":
    main()
