"""Draws the live memory of one training step: forward, forward, backward (after Figure 3 of arXiv 2605.22967).

    python benchmarks/memory_timeline.py docs/memory_timeline.png

Each curve is the resident memory of a process of its own, sampled every millisecond, less what it held before the step:
model and data. Dots mark where a forward pass begins, diamonds where the backward pass does.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import psutil
from rollout_workload import Workload

CURVES = {
    "relay, doubled sequence as published": Workload(denoiser="published"),
    "relay, our engine": Workload(),
    "relay, our engine, gradient checkpointing": Workload(checkpointing=True),
    "relay_sg, our engine, gradient_window=1": Workload(objective="relay_sg", window=1),
    "complementary, our engine": Workload(objective="complementary"),
}


def record(workload: Workload) -> dict:
    """Seconds and mebibytes over one step, and when the passes began."""
    model, rows = workload.build()
    process, samples, begins, is_done = psutil.Process(), [], [], threading.Event()
    model.register_forward_pre_hook(lambda *_: begins.append((time.perf_counter(), "forward")))
    model.register_forward_hook(lambda *_: begins.append((time.perf_counter(), "backward")))

    def sample() -> None:
        while not is_done.is_set():
            samples.append((time.perf_counter(), process.memory_info().rss / 2**20))
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
    workload.step(model, rows)
    is_done.set()
    sampler.join()
    start, idle = samples[0]
    # What follows a forward pass is a backward pass, unless it is the next forward pass.
    passes = [one for one, following in zip(begins, [*begins[1:], (0, "end")], strict=True)
              if one[1] == "forward" or following[1] != "forward" or following[0] - one[0] > 0.2]  # fmt: skip
    return {
        "samples": [(at - start, mebibytes - idle) for at, mebibytes in samples],
        "begins": [(at - start, kind) for at, kind in passes],
    }


def draw(records: dict[str, dict], path: Path) -> None:
    """One curve per record."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for label, one in records.items():
        times, mebibytes = zip(*one["samples"], strict=True)
        (line,) = axes.plot(times, mebibytes, label=f"{label}: peak {max(mebibytes):,.0f} MiB", linewidth=1.5)
        for at, kind in one["begins"]:
            height = next(value for moment, value in one["samples"] if moment >= at)
            axes.plot(at, height, "o" if kind == "forward" else "D", color=line.get_color(), markersize=5)
    axes.set_xlabel("seconds")
    axes.set_ylabel("live memory of the step (MiB)")
    axes.set_title("One training step, K = 2, vocabulary 151 936, hidden 256, 6 layers, 2 x 512 tokens")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        print(json.dumps(record(Workload(**json.loads(sys.argv[2])))))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    # Freed tensors go back to the system at once, so that resident memory is live memory.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    records = {}
    for label, workload in CURVES.items():
        command = [sys.executable, __file__, "--record", json.dumps(asdict(workload))]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        records[label] = json.loads(output)
    draw(records, path)
    peaks = {label: max(mebibytes for _, mebibytes in one["samples"]) for label, one in records.items()}
    print(json.dumps({"peak_mebibytes": peaks}))
