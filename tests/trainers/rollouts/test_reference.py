"""Residual context training: what a frozen reference, or the model itself, predicts enters as the state."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor

from relay_hf import RelayForMaskedDiffusion
from relay_hf.trainers import RelayTrainer
from relay_hf.trainers.objectives import RECIPES, mean_of_positions
from relay_hf.trainers.rollouts.denoiser import SequenceDenoiser, make_denoiser
from relay_hf.trainers.rollouts.noise import mask_uniformly
from relay_hf.trainers.rollouts.reference import Reference
from relay_hf.trainers.rollouts.rollout import Rollout, stay
from relay_hf.trainers.rollouts.rows import RolloutRows, fresh_rows

from ..conftest import MASK, build_model, build_rows
from ..test_relay_trainer import logged, weights
from .doubled import DoubledDenoiser

RESIDUAL = {"relay_channel": "residual_context", "relay_temperature": 0.7}


def reference_of(**overrides: Any) -> RelayForMaskedDiffusion:
    """A model of another width that knows nothing of channels."""
    model = build_model(seed=7, relay_channel="none", **overrides).eval()
    config = copy.deepcopy(model.config)
    config.text_config.update({"hidden_size": 8, "intermediate_size": 16})
    config.text_config.head_dim = 4
    torch.manual_seed(7)
    return RelayForMaskedDiffusion(config).eval()


def noisy_rows(model: Any, seed: int = 0, length: int = 14) -> RolloutRows:
    rows = fresh_rows(model.config, build_rows(3, length=length, seed=seed), keeps_state=False)
    return mask_uniformly(rows, model.config, [torch.Generator().manual_seed(seed + row) for row in range(3)])


def plain_logits(model: Any, rows: RolloutRows) -> Tensor:
    """(B, L, V) position-aligned, from the doubled sequence if there are blocks."""
    with torch.no_grad():
        if model.config.block_size is None:
            return model(rows.noisy_ids(MASK), rows.attention_mask).logits
        doubled = DoubledDenoiser(model, model.config, rows)
        with doubled._raw_outputs():
            length = rows.clean_ids.shape[1]
            return doubled._shift(model(**doubled._inputs(rows, None), logits_to_keep=torch.arange(length)).logits)


def state_in_numpy(logits: Tensor, model: Any, rows: RolloutRows) -> Tensor:
    """The published equations, for every position that shows [MASK]."""
    z, table = logits.double().numpy(), model.get_input_embeddings().weight.detach().double().numpy()

    def softmax(values: np.ndarray) -> np.ndarray:
        exponentials = np.exp(values - values.max(-1, keepdims=True))
        return exponentials / exponentials.sum(-1, keepdims=True)

    tempered = softmax(z / model.config.relay_temperature)
    weight = -(tempered * np.log(tempered)).sum(-1) / math.log(z.shape[-1])
    state = np.concatenate([softmax(z) @ table, weight[..., None]], -1)
    state[(rows.noisy_ids(MASK) != MASK).numpy()] = 0
    return torch.tensor(state, dtype=torch.float32)


def begin(model: Any, rows: RolloutRows, reference: Reference | None) -> Rollout:
    recipe = RECIPES["residual_context"]
    reduce_loss = mean_of_positions(recipe, share=lambda count: count)
    denoiser = make_denoiser(model, model.config, rows)
    supplier = make_denoiser(reference, reference.config, rows) if reference is not None else None
    return Rollout(denoiser, rows, [stay], recipe.carry, reduce_loss, reference=supplier)


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(
    block_size=st.sampled_from([None, 2, 4]),
    shift=st.booleans(),
    has_reference=st.booleans(),
    length=st.integers(5, 14),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradients_equal_the_published_equations(
    block_size: int | None, shift: bool, has_reference: bool, length: int, seed: int
) -> None:
    """Weight from the reference's entropy, residual in the target's embeddings, both from the same noisy text."""
    shape = {"block_size": block_size, "token_shift": shift and block_size is not None}
    model = build_model(seed=seed, **RESIDUAL, **shape)
    reference = reference_of(**shape) if has_reference else None
    rows = noisy_rows(model, seed, length)
    begin(model, rows, Reference(reference, model) if reference else None).run_window().backward()
    result = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    state = state_in_numpy(plain_logits(reference or model, rows), model, rows)
    plain = SequenceDenoiser(model, model.config) if block_size is None else DoubledDenoiser(model, model.config, rows)
    (plain.step(rows, state, leaves_state=False).losses.sum() / rows.masked.sum()).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert result.keys() == expected.keys()
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((result[name] - gradient).norm()) <= 1e-5 * scale, name
    assert reference is None or all(parameter.grad is None for parameter in reference.parameters())


def test_state_changes_the_loss_and_comes_from_the_reference() -> None:
    model = build_model(**RESIDUAL)
    rows = noisy_rows(model)
    of_itself = begin(model, rows, None).run_window()
    of_reference = begin(model, rows, Reference(reference_of(), model)).run_window()
    losses = DoubledDenoiser(model, model.config, rows).step(rows, None, leaves_state=False).losses
    plain = losses.sum() / rows.masked.sum()
    assert len({round(loss.item(), 4) for loss in (of_itself, of_reference, plain)}) == 3


def test_soft_mask_weights_learn_from_predictions_of_the_model_itself() -> None:
    model = build_model(relay_channel="soft_mask")
    with torch.no_grad():
        model.relay.weight[0] = 1.0  # the share of the predictions starts at 0, and would hide the other two
    begin(model, noisy_rows(model), None).run_window().backward()
    assert model.relay.weight.grad.abs().min() > 0


def memorised() -> Dataset:
    return Dataset.from_dict({n: t.repeat(64, 1).tolist() for n, t in build_rows(1).items() if n != "attention_mask"})


@pytest.mark.parametrize("block_size", [4, None])
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])])
def test_train_with_a_reference_leaves_it_alone_and_resumes_exactly(
    make_trainer: Callable[..., RelayTrainer], tmp_path: Path, block_size: int | None, peft_config: LoraConfig | None
) -> None:
    shape = {"block_size": block_size, "token_shift": block_size is not None}
    reference = reference_of(**shape)
    before = copy.deepcopy(reference.state_dict())

    def trainer() -> RelayTrainer:
        return make_trainer(
            build_model(**RESIDUAL, **shape), memorised(), objective="residual_context", max_steps=30,
            learning_rate=1e-2, save_strategy="steps", save_steps=15,
            trainer_options={"reference_model": reference, "peft_config": peft_config},
        )  # fmt: skip

    whole = trainer()
    whole.train()
    losses = logged(whole, "loss")
    assert sum(losses[-5:]) < (0.9 if peft_config else 0.5) * sum(losses[:5])
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.requires_grad for parameter in reference.parameters())

    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-15"))
    for name, tensor in weights(resumed.model).items():
        assert torch.equal(tensor, weights(whole.model)[name]), name


def test_reference_given_as_path_is_loaded_and_named_on_the_card(
    make_trainer: Callable[..., RelayTrainer], tmp_path: Path
) -> None:
    reference_of().save_pretrained(tmp_path / "stage-one")
    options = {"reference_model": str(tmp_path / "stage-one")}
    trainer = make_trainer(build_model(**RESIDUAL), objective="residual_context", trainer_options=options)
    trainer.create_model_card("stage-two")
    card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    assert "frozen reference" in card
    assert "a frozen reference, `stage-one`," in card, "without the path to it"
    assert "mean embedding" in card


@pytest.mark.parametrize(
    ("overrides", "objective", "message"),
    [
        ({"mask_token_id": 38}, "residual_context", r"= \(40, 38, 4\), but this model has \(40, 39, 4\)"),
        ({"block_size": 2}, "residual_context", r"= \(40, 39, 2\), but this model has \(40, 39, 4\)"),
        ({}, "relay_sg", "`reference_model` has no effect with `objective='relay_sg'`"),
    ],
)
def test_reference_that_does_not_fit_raises(
    make_trainer: Callable[..., RelayTrainer], overrides: dict, objective: str, message: str
) -> None:
    reference = build_model(relay_channel="none", **overrides)
    with pytest.raises(ValueError, match=message):
        make_trainer(build_model(**RESIDUAL), objective=objective, trainer_options={"reference_model": reference})


def test_reference_that_is_the_trained_model_raises(make_trainer: Callable[..., RelayTrainer]) -> None:
    model = build_model(**RESIDUAL)
    with pytest.raises(ValueError, match="is the trained model itself"):
        make_trainer(model, objective="residual_context", trainer_options={"reference_model": model})


def test_reference_that_is_no_relay_model_raises(make_trainer: Callable[..., RelayTrainer]) -> None:
    with pytest.raises(ValueError, match="`reference_model` is a Linear"):
        make_trainer(
            build_model(**RESIDUAL),
            objective="residual_context",
            trainer_options={"reference_model": torch.nn.Linear(2, 2)},
        )


def test_objective_with_a_channel_that_reads_hidden_states_raises(make_trainer: Callable[..., RelayTrainer]) -> None:
    with pytest.raises(ValueError, match=r"needs a channel that reads predictions, .* `relay_channel='layer_norm'`"):
        make_trainer(build_model(), objective="residual_context")
