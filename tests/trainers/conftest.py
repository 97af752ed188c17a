"""A tiny model and tiny data for training: two layers of width 16, rows of two to three blocks of four."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.modeling import UnmaskingPolicy
from relay_hf.testing import byte_tokenizer
from relay_hf.trainers import RelayTrainer, RelayTrainerConfig
from relay_hf.trainers.objectives import RECIPES, mean_of_positions
from relay_hf.trainers.rollouts.denoiser import Denoiser, make_denoiser
from relay_hf.trainers.rollouts.rollout import Reveal, Rollout
from relay_hf.trainers.rollouts.rows import RolloutRows

from ..conftest import text_config

VOCAB_SIZE, MASK = 40, 39
OBJECTIVES = ("relay", "relay_sg", "rollout", "residual_context", "masked", "complementary")


def build_model(seed: int = 0, channel_scale: float = 0.3, **overrides: Any) -> RelayForMaskedDiffusion:
    """A random model whose channel is open by `channel_scale`."""
    torch.manual_seed(seed)
    backbone = text_config(vocab_size=VOCAB_SIZE, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3)
    options = {"block_size": 4, "mask_token_id": MASK, "token_shift": True, **overrides}
    model = RelayForMaskedDiffusion(RelayConfig(text_config=backbone, **options))
    if model.config.relay_channel == "layer_norm":
        torch.nn.init.normal_(model.relay.norm.weight, std=channel_scale)
        torch.nn.init.normal_(model.relay.norm.bias, std=channel_scale)
    return model


def build_model_for(objective: str, **overrides: Any) -> RelayForMaskedDiffusion:
    """A model whose channel the objective can train."""
    if objective == "residual_context":
        overrides = {**overrides, "relay_channel": "residual_context", "relay_scope": "masked"}
    return build_model(**overrides)


def build_rows(count: int, length: int = 12, prompt: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of random text; the first `prompt` positions are not learned."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, MASK, (count, length), generator=generator)
    labels = input_ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)}


def begin_rollout(
    model: RelayForMaskedDiffusion,
    rows: RolloutRows,
    policies: list[UnmaskingPolicy],
    objective: str,
    window: int | None = None,
    clean_block_starts: bool = False,
    make: Callable[..., Denoiser] = make_denoiser,
) -> Rollout:
    """A rollout as the trainer begins it; the policies say nothing to objectives with random masks."""
    recipe = RECIPES[objective]
    advances = [Reveal(policy, model.config.block_size) for policy in policies]
    if not recipe.uses_buffer:
        advances = recipe.advances(None, model.config, False)
    reduce_loss = mean_of_positions(recipe, share=lambda count: count)
    denoiser = make(model, model.config, rows, clean_block_starts)
    return Rollout(denoiser, rows, advances, recipe.carry, reduce_loss, window)


def run_rollout(*args: Any) -> tuple[torch.Tensor, Rollout]:
    """All steps in one window: their loss, with its graph, and the rollout behind it."""
    rollout = begin_rollout(*args)
    return rollout.run_window(), rollout


def build_dataset() -> Dataset:
    """64 rows that are learned but for their first three tokens."""
    rows = build_rows(64)
    return Dataset.from_dict({name: rows[name].tolist() for name in ("input_ids", "labels")})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Its special ids are inside the tiny vocabulary; only there because SFTTrainer insists on a tokenizer."""
    return byte_tokenizer(pad_token="!", eos_token='"', mask_token=None)


def build_trainer(
    output_dir: Any, model: Any = None, data: Dataset | None = None, trainer_options: dict | None = None, **options: Any
) -> RelayTrainer:
    """A trainer of four quick steps that writes nothing; `options` are training arguments."""
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "unmasking_threshold": 0.3,
    }
    return RelayTrainer(
        build_model() if model is None else model,
        RelayTrainerConfig(**{**defaults, **options}),
        train_dataset=build_dataset() if data is None else data,
        **{"processing_class": build_tokenizer(), **(trainer_options or {})},
    )


@pytest.fixture(scope="session", name="byte_tokenizer")
def fixture_of_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def dataset() -> Dataset:
    return build_dataset()


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., RelayTrainer]:
    def make(*args: Any, output_dir: Any = None, **options: Any) -> RelayTrainer:
        return build_trainer(output_dir or tmp_path / "run", *args, **options)

    return make
