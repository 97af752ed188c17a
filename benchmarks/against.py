"""What `generate` and a training step cost here against another checkout of this repository, in turns.

    git worktree add /tmp/before v0.1.0
    python benchmarks/against.py /tmp/before

Each turn runs one process of each checkout; every process warms up, times each case a few times and reports its median.
The last line is one JSON object: for each case the medians over the turns and the median ratio (other / this; above 1
this one is faster). Only public names are used, so that older checkouts run.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

BLOCK = 32


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def time_cases(repeats: int) -> dict[str, float]:
    """Median seconds of every case, in this process."""
    import torch
    from transformers import Qwen2Config

    from relay_hf import RelayConfig, RelayForMaskedDiffusion

    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = Qwen2Config(
        vocab_size=32_000, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False, max_position_embeddings=8192,
    )  # fmt: skip
    model = RelayForMaskedDiffusion(RelayConfig.fast_dllm_v2(text, mask_token_id=31_999)).eval()
    with torch.no_grad():
        model.model.norm.weight *= 60.0  # as in `decode_workload.py`: two to three tokens a step
        model.relay.norm.weight.normal_(std=0.02)

    def generate(lengths: list[int], **options: object) -> None:
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for row, length in enumerate(lengths):
            ids[row, max(lengths) - length :] = torch.randint(1, 31_000, (length,))
        mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
        model.generate(ids, attention_mask=mask, max_new_tokens=64, eos_token_id=None, pad_token_id=0, **options)

    cases: dict[str, Callable[[], object]] = {
        "batch 1": lambda: generate([72]),
        "batch 8 ragged": lambda: generate([40 + 53 * row // 7 for row in range(8)]),
        "batch 8 even": lambda: generate([72] * 8),
        "batch 1, fused commits": lambda: generate([72], fuse_commits=True),
        "batch 1, long prompt": lambda: generate([4104]),
    }
    seconds = {}
    for name, run in cases.items():
        run()
        torch.manual_seed(1)
        seconds[name] = median(timed(run) for _ in range(repeats))
    seconds["training step"] = time_training(model, repeats)
    return seconds


def time_training(model: object, repeats: int) -> float:
    """Median seconds of an optimizer step of the relay objective, in one run of the trainer."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from relay_hf import RelayTrainer, RelayTrainerConfig
    from relay_hf.tasks.sudoku import make_sudoku_tokenizer

    rows = torch.randint(1, 31_000, (64, 128), generator=torch.Generator().manual_seed(0)).tolist()
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            ends.append(time.perf_counter())

    with TemporaryDirectory() as folder:
        arguments = RelayTrainerConfig(
            folder, max_steps=repeats + 3, per_device_train_batch_size=4, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True, logging_strategy="no", gradient_checkpointing=False,
        )  # fmt: skip
        tokenizer = make_sudoku_tokenizer(6)
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        RelayTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]).train()
    return median(b - a for a, b in itertools.pairwise(ends[2:]))


def run_in(checkout: Path, repeats: int) -> dict[str, float]:
    """What a process reports that imports `relay_hf` from a checkout."""
    command = [sys.executable, __file__, str(checkout), "--worker", "--repeats", str(repeats)]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(checkout)}, capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(time_cases(arguments.repeats)))
    else:
        this = Path(__file__).parents[1]
        turns = [
            (run_in(arguments.other, arguments.repeats), run_in(this, arguments.repeats))
            for _ in range(arguments.turns)
        ]
        result = {
            case: {
                "other_s": median(other[case] for other, _ in turns),
                "this_s": median(own[case] for _, own in turns),
                "ratio": median(other[case] / own[case] for other, own in turns),
            }
            for case in turns[0][0]
        }
        print(json.dumps(result))
