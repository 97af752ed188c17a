"""Training on traces of decoding: any channel learns from them, and rows without a whole one are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from relay_hf.trainers import RelayTrainer

from .conftest import build_model, build_rows
from .test_relay_trainer import logged


def traced_dataset(count: int = 32) -> Dataset:
    """Rows whose traces reveal two learned positions of each block in every step."""
    rows = build_rows(count)
    steps = (torch.arange(12) % 4 // 2 + 1).expand(count, -1)
    return Dataset.from_dict({**{name: rows[name].tolist() for name in ("input_ids", "labels")}, "reveal_steps": steps})


@pytest.mark.parametrize("channel", ["layer_norm", "none", "soft_mask", "residual_context"])
@pytest.mark.parametrize("block_size", [4, None])
def test_objective_traces_trains_any_channel(make_trainer: Callable, channel: str, block_size: int | None) -> None:
    model = build_model(relay_channel=channel, block_size=block_size, token_shift=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"objective": "traces", "trace_stride": 1, "staggered_start": False, "max_steps": 3}
    trainer = make_trainer(model, traced_dataset(), **options)
    trainer.train()
    # The first block has one learned position, which its trace reveals second; without blocks, with the others.
    assert [logged(trainer, f"reveals_step_{k}")[0] for k in (1, 2)] == ([5, 4] if block_size else [4, 5])
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any(name.startswith("relay") for name in changed) == (channel in ("layer_norm", "soft_mask"))
    assert any(not name.startswith("relay") for name in changed)


def test_trace_stride_reveals_as_many_steps_at_once(make_trainer: Callable) -> None:
    revealed = []
    for stride in (1, 2):
        options = {"objective": "traces", "trace_stride": stride, "staggered_start": False, "max_steps": 1}
        trainer = make_trainer(build_model(), traced_dataset(), rollout_steps=1, **options)
        trainer.train()
        revealed.append(logged(trainer, "reveals_step_1")[0])
    assert revealed == [5, 9]  # the first three positions are the prompt


def test_objective_traces_evaluates_and_learns_a_stream(make_trainer: Callable) -> None:
    stream = IterableDataset.from_generator(lambda: iter(traced_dataset().to_list()))
    options = {"objective": "traces", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    trainer = make_trainer(build_model(), stream, {"eval_dataset": traced_dataset(4)}, **options)
    trainer.train()
    assert logged(trainer, "eval_loss")[0] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"reveal_steps": None},
            "Row 1 .* has `None` in the column `reveal_steps`, which must hold a list of whole num",
        ),
        ({"reveal_steps": [1] * 11}, "Row 1 of the training set has 11 numbers in `reveal_steps` for 12 `input_ids`"),
        ({"reveal_steps": [0, -3] * 6}, "Row 1 .* has the number -3 in `reveal_steps`, which count from 0"),
        (
            {"reveal_steps": [0.5] * 12},
            "Row 1 .* in the column `reveal_steps`, which must hold a list of whole numbers",
        ),
    ],
)
def test_row_without_a_whole_trace_raises(make_trainer: Callable, change: dict[str, Any], message: str) -> None:
    rows = traced_dataset(3).to_list()
    rows[1].update(change)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match=message):
        make_trainer(build_model(), stream, objective="traces").train()


def test_traces_in_no_column_or_too_long_raise(make_trainer: Callable[..., RelayTrainer]) -> None:
    rows = traced_dataset(3)
    with pytest.raises(
        ValueError, match=r"has the columns \['input_ids', 'labels'\], but `objective='traces'` follows"
    ):
        make_trainer(build_model(), rows.remove_columns("reveal_steps"), objective="traces")
    with pytest.raises(ValueError, match=r"Row 0 .* has 12 tokens, and a trace cannot be cut to `max_length=8`"):
        make_trainer(build_model(), rows, objective="traces", max_length=8)


def test_other_objective_passes_over_traces(make_trainer: Callable[..., RelayTrainer]) -> None:
    losses = []
    for rows in (traced_dataset(), traced_dataset().remove_columns("reveal_steps")):
        trainer = make_trainer(build_model(), rows)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


def test_traces_side_by_side_are_followed(make_trainer: Callable[..., RelayTrainer]) -> None:
    options = {"objective": "traces", "packing": True, "max_length": 24, "max_steps": 1, "staggered_start": False}
    trainer = make_trainer(build_model(), traced_dataset(), **options)
    trainer.train()
    assert logged(trainer, "buffer_refills") == [8]
    assert logged(trainer, "reveals_step_1") == [9]
