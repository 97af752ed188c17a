"""The arms of the text study on a GPU, with a model of 34 million parameters and replies of two blocks.

    python benchmarks/text_gpu.py                           # a quarter of an hour
    python benchmarks/text_gpu.py --minutes 5 --seeds 1     # as many arms as five minutes allow
    python benchmarks/study.py text --seeds --output_dir runs/text_gpu --hidden_size 512 --layers 8 --size 32 \\
        --batch_size 128 --warmup_steps 1500 --steps 200    # tables of what is there

Prints one line of JSON for the machine, and one for each arm as it ends. No arm begins that would end too late, by the
time that the longest one took; what is done is kept, and the next call goes on with what is missing.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from study import STUDIES, claim
from study_runner import START, Runner
from transformers.utils import logging

ARMS = (START, "complementary", "rollout", "relay_sg", "relay, W = 2", "relay, W = 4", "pumba, W = 2")
SIZES = {"hidden_size": 512, "layers": 8, "size": 32, "batch_size": 128, "warmup_steps": 1500, "steps": 200}
SHARE_OF_START = 0.5  # of the time of the start, which the longest arm may take before one has been timed


def run(folder: Path, seeds: int, minutes: float, sizes: dict[str, Any]) -> None:
    """Trains and evaluates all arms of a seed, then those of the next, as long as there is time.

    Args:
        folder: where everything is kept.
        seeds: how many.
        minutes: for all of it.
        sizes: of the workload.

    Raises:
        ValueError: the folder holds results of other sizes.
    """
    study, began, longest = STUDIES["text"], time.monotonic(), 0.0
    claim(folder, "text", sizes)
    runner = Runner(study.workload(**sizes), study.arms, folder)
    for seed in range(seeds):
        for name in ARMS:
            if runner.results.find(name, seed, "steps") is not None:
                continue
            arm_began = time.monotonic()
            if arm_began - began + longest > 60 * minutes:
                print(json.dumps({"stopped": f"before {name} of seed {seed}: {minutes:g} minutes would not be enough"}))
                return
            runner.run(name, seed)
            seconds = time.monotonic() - arm_began
            longest = max(longest, seconds * (SHARE_OF_START if name == START else 1))
            curve = runner.results.find(name, seed, "steps")["curves"][""]
            found = [{key: point[key] for key in ("threshold", "forwards", "exact")} for point in curve]
            print(json.dumps({"arm": name, "seed": seed, "seconds": round(seconds, 1), "curve": found}), flush=True)


def machine() -> dict[str, Any]:
    """Card and versions."""
    accelerator = torch.accelerator.current_accelerator()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else str(accelerator or "cpu")
    return {"device": card, "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=14.0, help="no arm begins that would end later")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/text_gpu"))
    options = parser.parse_args()
    logging.set_verbosity_error()
    print(json.dumps(machine()), flush=True)
    run(options.output_dir, options.seeds, options.minutes, SIZES)


if __name__ == "__main__":
    main()
