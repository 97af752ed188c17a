"""One training step of a rollout: the block denoiser against the plain doubled sequence, in one run.

python benchmarks/rollout_step.py                    # vocabularies of 4 096 and 151 936, time and memory
python benchmarks/rollout_step.py --vocab 4096 --repeats 3 --no-memory

Both compute the same losses and gradients (`tests/trainers/test_denoiser.py`) and send only masked positions through
the head. Times are forward and backward of K steps, alternating, medians per state of the buffer, summed over its
lifetime: all blocks active down to one. Memory (Linux) is the peak of a process that makes one step with all blocks
active, less that of a process that builds the same and does nothing. The last line is one JSON
object.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from transformers import Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[1]))
from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.modeling import make_policy
from relay_hf.trainers import rollout
from relay_hf.trainers.buffer import fresh_rows
from relay_hf.trainers.denoiser import BlockDenoiser
from relay_hf.trainers.rows import RolloutRows
from tests.trainers.doubled import DoubledDenoiser

DENOISERS = {"plain": DoubledDenoiser, "engine": BlockDenoiser}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 151_936])
parser.add_argument("--hidden", type=int, default=256)
parser.add_argument("--layers", type=int, default=6)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--prompt", type=int, default=128)
parser.add_argument("--batch", type=int, default=2)
parser.add_argument("--steps", type=int, default=2, help="K")
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--no-memory", action="store_true")
parser.add_argument("--peak-of", choices=["idle", *DENOISERS], help="print this process's peak memory and stop")
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)


def build(vocab: int) -> tuple[RelayForMaskedDiffusion, RolloutRows]:
    torch.manual_seed(0)
    backbone = Qwen2Config(
        vocab_size=vocab, hidden_size=arguments.hidden, intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.layers, num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = RelayForMaskedDiffusion(RelayConfig.fast_dllm_v2(backbone, mask_token_id=vocab - 1)).train()
    input_ids = torch.randint(0, vocab - 1, (arguments.batch, arguments.length))
    labels = input_ids.clone()
    labels[:, : arguments.prompt] = -100
    return model, fresh_rows(model.config, {"input_ids": input_ids, "labels": labels}, carries_state=True)


def with_active_blocks(rows: RolloutRows, count: int, block_size: int) -> RolloutRows:
    """All but the last `count` blocks revealed."""
    first = arguments.length - count * block_size
    return replace(rows, noisy_ids=torch.cat([rows.clean_ids[:, :first], rows.noisy_ids[:, first:]], dim=1))


def step(model: RelayForMaskedDiffusion, rows: RolloutRows, denoiser: str) -> float:
    """Seconds of one forward and backward."""
    rollout.make_denoiser = DENOISERS[denoiser]
    policies = [make_policy("confidence_threshold", 0.85)] * arguments.steps
    model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    rollout.run_rollout(model, model.config, rows, policies, "relay").loss.backward()
    return time.perf_counter() - began


def peak_mebibytes(vocab: int, what: str) -> float:
    """Peak memory of a process of its own."""
    command = [sys.executable, __file__, "--peak-of", what, "--vocab", str(vocab)]
    for name in ("hidden", "layers", "length", "prompt", "batch", "steps", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if arguments.peak_of:
    model, rows = build(arguments.vocab[0])
    if arguments.peak_of != "idle":
        step(model, rows, arguments.peak_of)
    # The kernel's own peak of this process; `ru_maxrss` would start from the parent's.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 1024)
    sys.exit()

results = {}
for vocab in arguments.vocab:
    model, rows = build(vocab)
    size = model.config.block_size
    blocks = (arguments.length - arguments.prompt) // size
    totals = dict.fromkeys(DENOISERS, 0.0)
    ratios = {}
    step(model, with_active_blocks(rows, 1, size), "engine")
    for count in range(blocks, 0, -1):
        state = with_active_blocks(rows, count, size)
        times = {name: [] for name in DENOISERS}
        for _ in range(arguments.repeats):
            for name in DENOISERS:
                times[name].append(step(model, state, name))
        medians = {name: median(values) for name, values in times.items()}
        totals = {name: totals[name] + medians[name] for name in DENOISERS}
        ratios[count] = medians["plain"] / medians["engine"]
        print(f"vocabulary {vocab}, {count:2d} active blocks: {medians['plain']:.3f} s / {medians['engine']:.3f} s "
              f"= {ratios[count]:.2f}", flush=True)  # fmt: skip
    results[vocab] = {"speedup": totals["plain"] / totals["engine"], "speedup_all_active": ratios[blocks]}
    if not arguments.no_memory:
        del model, rows
        idle, plain, engine = (peak_mebibytes(vocab, what) for what in ("idle", "plain", "engine"))
        results[vocab] |= {
            "memory_ratio": (engine - idle) / (plain - idle),
            "plain_mebibytes": plain - idle,
            "engine_mebibytes": engine - idle,
        }
settings = {name: value for name, value in vars(arguments).items() if name not in ("vocab", "peak_of", "no_memory")}
environment = {"machine": platform.machine(), "torch": torch.__version__}
print(json.dumps({**results[arguments.vocab[-1]], "by_vocabulary": results, **settings, **environment}))
