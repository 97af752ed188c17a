"""The recipes as they ship: they parse, they say what was published, and they train."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from relay_hf.cli import main
from relay_hf.commands.train_arguments import TrainArguments, parse
from relay_hf.recipes import recipe_path

from .conftest import write_rows
from .test_prepare_data import code_row, math_row

RECIPES = sorted(path.stem for path in recipe_path().glob("*.yaml"))


def read(name: str, *options: str) -> TrainArguments:
    return parse("relay-hf train", name, ["--use_cpu", *options])


def test_recipes_are_found_by_name_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ["fast_dllm_v2_relay", "fast_dllm_v2_relay_lora", "llada_pumba", "sdar_relay", "smoke", "smollm2_cpu"]
    assert ours == RECIPES
    assert recipe_path("smoke") == recipe_path("smoke.yaml") == recipe_path(str(recipe_path("smoke")))
    monkeypatch.chdir(tmp_path)
    Path("smoke.yaml").touch()  # the user's own file comes first
    assert recipe_path("smoke.yaml") == Path("smoke.yaml")


def test_published_recipe_says_what_was_published() -> None:
    data, training, model, _ = read("fast_dllm_v2_relay")
    assert model.model_name_or_path == "Efficient-Large-Model/Fast_dLLM_v2_1.5B"
    assert data.dataset_name == "data/c40m60.jsonl"
    assert (training.learning_rate, training.max_steps, training.unmasking_threshold) == (5e-6, 200, 0.85)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 64
    assert (training.max_length, training.bf16, training.gradient_checkpointing) == (2048, True, True)
    assert (training.objective, training.rollout_steps, training.weight_decay) == ("relay", 2, 0)
    assert (training.rows_on_demand, training.staggered_start, training.sub_block_size) == (False, False, None)
    assert (training.max_grad_norm, training.relay_learning_rate) == (1.0, None)


def test_pumba_recipe_says_what_was_published() -> None:
    training = read("llada_pumba").training
    assert (training.rollout_steps, training.gradient_window, training.step_reduction) == (8, None, "mean")
    assert (training.unmasking_count, training.unmasking_threshold) == (32, 0.9)
    assert (training.loss_weight_cap, training.z_loss, training.staggered_start) == (5.0, 1e-5, False)
    assert (training.learning_rate, training.relay_learning_rate) == (2.5e-6, None)
    assert (training.max_steps, training.warmup_steps, training.lr_scheduler_type) == (4000, 200, "cosine")


def test_schedule_follows_the_cosine_of_three_epochs_to_half_a_percent() -> None:
    from torch import nn, optim
    from transformers import get_cosine_schedule_with_warmup, get_scheduler

    training = read("fast_dllm_v2_relay").training
    planned = 60_000 * 3 // 64
    optimizers = [optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0) for _ in range(2)]
    cosine = get_cosine_schedule_with_warmup(optimizers[0], training.get_warmup_steps(planned), planned)
    ours = get_scheduler(training.lr_scheduler_type, optimizers[1], training.get_warmup_steps(200), 200)
    for _ in range(training.max_steps):
        assert ours.get_last_lr()[0] == pytest.approx(cosine.get_last_lr()[0], rel=5e-3)
        for optimizer, schedule in zip(optimizers, (cosine, ours), strict=True):
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_a_tiny_model_on_data_that_the_script_made(name: str, checkpoint: Path, tmp_path: Path) -> None:
    code = write_rows(tmp_path / "code.jsonl", [code_row(f"c{i}") for i in range(8)])
    math = write_rows(tmp_path / "math.jsonl", [math_row(f"m{i}") for i in range(8)])
    data = tmp_path / "data.jsonl"
    sources = ["--code", str(code), "--math", str(math), "--code_rows", "4", "--math_rows", "6"]
    assert main(["prepare-data", str(data), *sources, "--model", str(checkpoint), "--max_tokens", "100"]) == 0
    small: dict[str, Any] = {
        "model_name_or_path": checkpoint,
        "dataset_name": data,
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    options = [str(text) for option, value in small.items() for text in (f"--{option}", value)]
    assert main(["train", "--config", name, *options]) == 0
    learning_rate = float(yaml.safe_load(recipe_path(name).read_text())["learning_rate"])
    card = ModelCard.load(tmp_path / "run" / "README.md").content
    assert f"| `learning_rate` | `{learning_rate}` |" in card
    assert "- Steps: 2" in card
