"""Ceilings on waits for the device and on launches. A change that raises one of these numbers fails here.

If a change lowers one, write the smaller number into the table, which `pytest -rA` of this file prints for every case:
the tables are meant to say what is. A model of two layers is counted; `benchmarks/waits.py` counts one of 28.
"""

from pathlib import Path

import pytest
import torch

from . import fakegpu
from .costs import Costs, build_model, decoding_costs, training_costs

LAYERS = 2
# Waits of a start, of a block beside its steps, and of a denoise step; launches of a denoise step.
DECODING: dict[tuple[str, str], tuple[float, float, float, float]] = {
    ("one row", "none"): (4, 0, 1, 198.8),
    ("one row", "layer_norm"): (4, 0, 1, 206),
    ("one row", "residual_context"): (4, 0, 1, 229),
    ("one row", "soft_mask"): (4, 0, 1, 235),
    ("8 even", "layer_norm"): (5, 0, 1, 207),
    ("8 ragged", "layer_norm"): (5, 0, 1, 217),
    ("8 ragged", "residual_context"): (5, 0, 1, 240),
    ("one row, static", "layer_norm"): (4, 0, 1, 224),
    ("8 ragged, static", "layer_norm"): (5, 0, 1, 225),
    ("one row, sampling", "layer_norm"): (4, 0, 1, 261),
    ("8 ragged, sampling", "layer_norm"): (5, 0, 1, 272),
    ("one row, fused commits", "layer_norm"): (4, 0, 1, 206),
    ("one row, sub-block cache", "layer_norm"): (4, 0, 1, 248.9),
    ("one row, self start", "layer_norm"): (4, 0, 1, 206),
    ("8 even, criteria", "layer_norm"): (5, 1, 1, 221),
    ("one row, time limit", "layer_norm"): (4, 0, 1, 206),
    ("one row, streamer", "layer_norm"): (5, 1, 1, 206),
    # A step is shown, and a block when it is done; its first step is planned with a wait, lest it be in vain.
    ("one row, drafts", "layer_norm"): (5, 2, 2, 206),
    ("8 ragged, stop tokens", "layer_norm"): (7, 0, 1, 283),
}
# Waits of an optimizer step, what logging adds to them, and launches of an optimizer step; for objective and K.
TRAINING: dict[tuple[str, int | None], tuple[float, float, float]] = {
    ("relay", 1): (3, 2, 1122),
    ("relay", 2): (4, 2, 1760),
    ("relay", 4): (6, 2, 3036),
    ("relay_sg", 2): (4, 2, 1737),
    ("rollout", 2): (4, 2, 1655),
    ("masked", None): (2, 2, 1060),
    ("complementary", None): (3, 2, 1618),
    ("residual_context", None): (3, 2, 1303),
}


def check(costs: tuple[float, ...], ceilings: tuple[float, ...]) -> None:
    print(costs)
    assert all(cost <= ceiling for cost, ceiling in zip(costs, ceilings, strict=True)), f"{costs}, not {ceilings}"


@pytest.mark.parametrize(("name", "channel"), DECODING)
def test_decoding_costs_what_the_table_says(device: torch.device, name: str, channel: str) -> None:
    costs = decoding_costs(build_model(LAYERS, channel, torch.bfloat16).eval(), name)
    waits = tuple(costs[part].rounded().waits for part in ("start", "block", "step"))
    check((*waits, costs["step"].rounded().launches), DECODING[name, channel])


@pytest.mark.parametrize(("objective", "rollout_steps"), TRAINING)
def test_training_costs_what_the_table_says(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, objective: str, rollout_steps: int | None
) -> None:
    fakegpu.default_to(fakegpu.NAME, monkeypatch)
    costs = training_costs(LAYERS, objective, rollout_steps)
    step, logging = costs["step"], costs["logging"]
    check((step.waits, logging.waits, step.launches), TRAINING[objective, rollout_steps])


def test_costs_add_up() -> None:
    assert Costs(3, 10).plus(Costs(1, 2), -2) == Costs(1, 6)
