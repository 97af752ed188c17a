"""Processes that are killed, and go on in the same number or another, reveal every row once an epoch."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from .multiprocess.killed import EPOCHS, ROWS, SETTINGS

ROOT = Path(__file__).parents[2]


RUNS: list[tuple[int, int | None]] = [(2, 8), (2, 13), (3, 17), (1, None)]  # processes, and the step that kills them


def test_epochs_of_killed_processes_reveal_every_row_twice(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainers.multiprocess.killed", str(tmp_path), json.dumps(RUNS)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    numbers, texts = Counter[int](), Counter[int]()
    for run, (processes, killed) in enumerate(RUNS):
        # What came after the last checkpoint was never saved, and is done again.
        last = killed // SETTINGS["save_steps"] * SETTINGS["save_steps"] if killed else 10**6
        for process in range(processes):
            for line in (tmp_path / f"{run}-{process}.txt").read_text().splitlines():
                step, number, text = map(int, line.split())
                if step <= last:
                    numbers[number] += 1
                    texts[text] += 1
    assert numbers == Counter(range(EPOCHS * ROWS))
    assert texts == Counter({text: EPOCHS for text in range(ROWS)})
    assert json.loads((tmp_path / "end.json").read_text())[1] == EPOCHS
