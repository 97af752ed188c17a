"""Training on the device gives the CPU's losses, for every objective and what it is combined with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from ..trainers.conftest import OBJECTIVES, build_model
from . import fakegpu
from .training import losses_of, train

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=None)
# Objective, fields of the model, and options.
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{objective: (objective, {}, {}) for objective in OBJECTIVES},
    **{f"{name}, one block": (name, {"block_size": None, "token_shift": False}, {}) for name in ("relay", "masked")},
    "one step": ("relay", {}, {"rollout_steps": 1}),
    "three steps": ("relay", {}, {"rollout_steps": 3}),
    "windows of one": ("relay", {}, {"rollout_steps": 3, "gradient_window": 1}),
    "windows of two": ("relay", {}, {"rollout_steps": 3, "gradient_window": 2}),
    "no shift": ("relay", {"token_shift": False}, {}),
    "packing": ("relay", {}, {"packing": True, "max_length": 24}),
    "packing, one block": ("relay", {"block_size": None, "token_shift": False}, {"packing": True, "max_length": 24}),
    "clean block starts": ("relay", {}, {"clean_block_starts": True}),
    "sub-blocks": ("relay", {}, {"sub_block_size": 2}),
    "budget": ("relay", {}, {"unmasking_policy": "confidence_budget", "threshold_jitter": 0.1}),
    "fixed count": ("relay", {}, {"unmasking_policy": "fixed_count", "unmasking_threshold": 2}),
    "no queue": ("relay", {}, {"rows_on_demand": False}),
    "accumulation": ("relay", {}, {"gradient_accumulation_steps": 2}),
    "checkpointing": ("relay", {}, {"gradient_checkpointing": True}),
    "groups": ("relay", {}, {"relay_learning_rate": 1e-2, "relay_weight_decay": 0.1}),
    "average": ("relay", {}, {"ema_decay": 0.9}),
    "lora": ("relay", {}, {"trainer_options": {"peft_config": LORA}}),
    "soft_mask": ("relay_sg", {"relay_channel": "soft_mask"}, {}),
    "pinned memory": ("relay", {}, {"dataloader_pin_memory": True, "dataloader_num_workers": 1}),
}


@pytest.mark.parametrize("name", RUNS)
def test_train_losses_equal_cpu(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    objective, model, options = RUNS[name]
    expected, losses = (
        losses_of(train(monkeypatch, place, tmp_path, objective, model, **options)) for place in ("cpu", fakegpu.NAME)
    )
    assert len(losses) == 4
    assert losses == pytest.approx(expected, rel=2e-3)


def test_train_with_reference_equals_cpu(device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = []
    for place in ("cpu", fakegpu.NAME):
        given = {"reference_model": build_model(seed=7, relay_channel="none")}
        runs.append(losses_of(train(monkeypatch, place, tmp_path, "residual_context", trainer_options=given)))
    assert runs[1] == pytest.approx(runs[0], rel=2e-3)


@pytest.mark.parametrize("options", [{"bf16": True}, {"bf16": True, "gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("objective", ["relay", "residual_context"])
def test_train_bf16_equals_full_precision_within_rounding(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, objective: str, options: dict[str, Any]
) -> None:
    expected = losses_of(train(monkeypatch, "cpu", tmp_path, objective))
    losses = losses_of(train(monkeypatch, fakegpu.NAME, tmp_path, objective, **options))
    assert losses[0] == pytest.approx(expected[0], rel=0.05)


def test_train_evaluates_saves_and_resumes(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = []
    for place in ("cpu", fakegpu.NAME):
        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9}
        train(monkeypatch, place, tmp_path, "relay", **options)
        resumed = train(monkeypatch, place, tmp_path, "relay", **options, max_steps=6, resumes=True)
        runs.append([*losses_of(resumed), resumed.evaluate(resumed.train_dataset.select(range(8)))["eval_loss"]])
    assert len(runs[0]) == 7
    assert runs[1] == pytest.approx(runs[0], rel=2e-3)
