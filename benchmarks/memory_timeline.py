"""Draws the live memory of one training step: forward, forward, backward (after Figure 3 of arXiv 2605.22967).

    python benchmarks/memory_timeline.py docs/memory_timeline.png

Each curve is the resident memory of a process of its own, sampled every millisecond, less what it held before the step:
model and data. Dots mark where a forward pass begins, diamonds where the backward pass reaches the head of a step.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
from rollout_workload import LIVE_MEMORY, Workload

CURVES = {
    "relay, published": Workload(denoiser="published"),
    "relay, ours": Workload(),
    "relay, ours, gradient checkpointing": Workload(checkpointing=True),
    "relay_sg, ours, gradient_window=1": Workload(objective="relay_sg", window=1),
    "complementary, ours": Workload(objective="complementary"),
}


def record(workload: Workload) -> dict:
    """Seconds and mebibytes over one step, and when the passes began."""
    model, rows = workload.build()
    process, samples, begins, is_done = psutil.Process(), [], [], threading.Event()
    model.register_forward_pre_hook(lambda *_: begins.append((time.perf_counter(), "forward")))
    model.lm_head.register_full_backward_pre_hook(lambda *_: begins.append((time.perf_counter(), "backward")))

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
    return {
        "samples": [(at - start, mebibytes - idle) for at, mebibytes in samples],
        "begins": [(at - start, kind) for at, kind in begins],
    }


def draw(records: dict[str, dict], path: Path) -> None:
    """One curve per record."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axes, labels in zip(panels, (list(CURVES)[:2], list(CURVES)[1:]), strict=True):
        for label in labels:
            one = records[label]
            color = f"C{list(CURVES).index(label)}"
            times, mebibytes = zip(*one["samples"], strict=True)
            axes.plot(times, mebibytes, color=color, label=f"{label}: peak {max(mebibytes):,.0f} MiB", linewidth=1.5)
            for at, kind in one["begins"]:
                height = next(value for moment, value in one["samples"] if moment >= at)
                axes.plot(at, height, "o" if kind == "forward" else "D", color=color, markersize=5)
        axes.set_xlabel("seconds")
        axes.set_ylim(bottom=0, top=1.25 * axes.get_ylim()[1])
        axes.legend(frameon=False, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("live memory of the step (MiB)")
    figure.suptitle("One training step, K = 2, vocabulary 151 936, hidden 256, 6 layers, 2 x 512 tokens")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        print(json.dumps(record(Workload(**json.loads(sys.argv[2])))))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, default=Workload.threads)
    arguments = parser.parse_args()
    records = {}
    for label, workload in CURVES.items():
        settings = asdict(replace(workload, threads=arguments.threads))
        command = [sys.executable, __file__, "--record", json.dumps(settings)]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=LIVE_MEMORY).stdout
        records[label] = json.loads(output)
    draw(records, arguments.path)
    peaks = {label: max(mebibytes for _, mebibytes in one["samples"]) for label, one in records.items()}
    print(json.dumps({"peak_mebibytes": peaks}))
