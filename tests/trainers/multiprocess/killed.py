"""A training of several processes that is killed and goes on, for `test_killed_processes.py`:

    python -m tests.trainers.multiprocess.killed FOLDER '[[2, 30], [2, 60], [3, null]]'

Each pair is one run: how many processes, and the step after which they are killed. Each process writes the rows that it
finishes into FOLDER/RUN-PROCESS.txt, a line each: the step, the number that training counts the row by, and its text.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from relay_hf.trainers import RelayTrainer
from relay_hf.trainers.rollouts.rows import RolloutRows

from ..conftest import build_trainer

ROWS, EPOCHS, DIGIT = 1000, 2, 33
SETTINGS: dict[str, Any] = {
    "max_steps": -1,
    "num_train_epochs": EPOCHS,
    "per_device_train_batch_size": 80,
    "staggered_start": False,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 1,
    "optim": "sgd",
}


def numbered_dataset() -> Dataset:
    """Rows of different lengths whose first two tokens, which are not learned, are their number."""
    ids = [[3 + n // DIGIT, 3 + n % DIGIT, *range(5, 8 + n % 7)] for n in range(ROWS)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]})


def write_finished(trainer: RelayTrainer, path: Path) -> None:
    """Writes every row that a rollout finishes."""
    buffer, store = trainer.buffer, trainer.buffer.store

    def note(rows: RolloutRows) -> None:
        ended = buffer.rows.masked.any(-1) & ~rows.masked.any(-1)
        with path.open("a") as file:
            for slot in ended.nonzero()[:, 0].tolist():
                high, low = (rows.clean_ids[slot, :2] - 3).tolist()
                file.write(f"{trainer.state.global_step + 1} {buffer.numbers[slot]} {high * DIGIT + low}\n")
        store(rows)

    buffer.store = note


class Kill(TrainerCallback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, run: int, process: int, processes: int, port: int, step: int | None) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        names = {"RANK": process, "LOCAL_RANK": process, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    trainer = build_trainer(folder / "run", data=numbered_dataset(), **SETTINGS)
    assert trainer.args.world_size == processes
    write_finished(trainer, folder / f"{run}-{process}.txt")
    trainer.add_callback(Kill(step))
    trainer.train(resume_from_checkpoint=run > 0)
    if process == 0:
        (folder / "end.json").write_text(json.dumps([trainer.state.global_step, trainer.state.epoch]))


def main(folder: Path, runs: list[tuple[int, int | None]]) -> None:
    context = multiprocessing.get_context("fork")  # imports cost more than the training
    for run, (processes, step) in enumerate(runs):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = [
            context.Process(target=train, args=(folder, run, process, processes, port, step))
            for process in range(processes)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(100)
        codes = [process.exitcode for process in started]
        if codes != [0 if step is None else -signal.SIGKILL] * processes:
            sys.exit(f"run {run} ended with {codes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
