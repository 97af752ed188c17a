"""Tokens and rows per second, and the share of padding, in the log."""

from collections.abc import Callable

import pytest
import torch
from datasets import Dataset

from relay_hf.trainers import RelayTrainer, throughput
from relay_hf.trainers.metrics import RunningMeans
from relay_hf.trainers.rollouts.rows import fresh_rows
from relay_hf.trainers.throughput import Throughput

from .conftest import build_model, build_rows


def test_throughput_counts_text_in_the_time_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    means, clock = RunningMeans(), iter([10.0, 12.0, 100.0, 101.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    rows = fresh_rows(build_model().config, build_rows(3), keeps_state=False).fit(16)  # 3 rows of 12 tokens
    callback = Throughput(means)
    for new_rows in (3, torch.tensor(0)):
        callback.on_step_begin(None, None, None)
        callback.add(rows, new_rows)
        callback.on_step_end(None, None, None)
    assert means.pop() == {"tokens_per_second": 72 / 3, "rows_per_second": 3 / 3, "padding": 0.25}


@pytest.mark.parametrize("objective", ["relay", "masked"])
def test_training_logs_its_throughput(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset, objective: str
) -> None:
    trainer = make_trainer(objective=objective, logging_steps=2)
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        assert entry["tokens_per_second"] > 0
        assert entry["padding"] == 0, "all rows have the same length, of whole blocks"
    assert trainer.state.log_history[0]["rows_per_second"] > 0
