"""What is logged: means at comparable noise, under the name of their data set, fetched when they are logged."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from relay_hf.trainers import RelayTrainer
from relay_hf.trainers.metrics import RunningMeans
from relay_hf.trainers.rollouts.rollout import loss_by_noise
from relay_hf.trainers.rollouts.rows import fresh_rows

from .conftest import build_model, build_rows


def test_running_means_are_weighted_and_begin_again_after_each_log() -> None:
    means = RunningMeans()
    means.add({"a": 1.0, "b": torch.tensor(3.0)})
    means.add({"a": 2.0})
    means.add_sum("c", torch.tensor(6.0), torch.tensor(4.0))
    means.add_sum("c", torch.tensor(0.0), torch.tensor(2.0))
    means.add_sum("nothing", torch.tensor(0.0), torch.tensor(0.0))
    assert means.pop() == {"a": 1.5, "b": 3.0, "c": 1.0}
    assert means.pop() == {}


@pytest.mark.parametrize(("block_size", "bins"), [(4, [(2.0, 1), (0, 0), (4.0, 3), (12.0, 4)]), (None, None)])
def test_loss_by_noise_sorts_positions_by_how_much_of_their_block_is_masked(
    block_size: int | None, bins: list | None
) -> None:
    model = build_model(block_size=block_size, token_shift=False)
    rows = fresh_rows(model.config, build_rows(1, length=12, prompt=0), keeps_state=False)
    masked = torch.tensor([[True, False, False, False, True, True, True, False, True, True, True, True]])
    losses = torch.tensor([[2.0, 0, 0, 0, 1.0, 1.0, 2.0, 0, 3.0, 3.0, 3.0, 3.0]])
    result = loss_by_noise(losses, replace(rows, masked=masked), block_size).T.tolist()
    # As one block, eight of twelve positions are masked: all of them are in the third quarter.
    expected = bins or [(0, 0), (0, 0), (18.0, 8), (0, 0)]
    assert [tuple(pair) for pair in result] == expected


def test_loss_by_noise_means_over_what_is_learned_of_a_block() -> None:
    model = build_model(block_size=4)
    rows = fresh_rows(model.config, build_rows(1, length=8, prompt=7), keeps_state=False)
    assert loss_by_noise(torch.tensor([[0.0] * 7 + [5.0]]), rows, 4).T.tolist() == [[0, 0], [0, 0], [0, 0], [5.0, 1.0]]


def test_losses_at_comparable_noise_are_logged(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer(max_steps=8, logging_steps=8, unmasking_threshold=0.2)
    trainer.train()
    entry = trainer.state.log_history[0]
    quarters = [entry[name] for name in entry if name.startswith("loss_masked_")]
    assert set(entry) >= {"loss_masked_25", "loss_masked_50", "loss_masked_75", "loss_masked_100"}
    steps = [entry["loss_step_1"], entry["loss_step_2"]]
    assert min(quarters) < sum(steps) / 2 < max(quarters), "they are means of one position, as those of a step are"


@pytest.mark.parametrize("objective", ["relay", "masked"])
def test_metrics_of_several_evaluation_sets_keep_their_names(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset, objective: str
) -> None:
    sets = {"x": dataset.select(range(8)), "y": dataset.select(range(8, 12))}
    trainer = make_trainer(
        objective=objective, trainer_options={"eval_dataset": sets}, eval_strategy="steps", eval_steps=4
    )
    trainer.train()
    logged = {name: entry[name] for entry in trainer.state.log_history for name in entry if "loss_step_1" in name}
    assert set(logged) == {"loss_step_1", "eval_x_loss_step_1", "eval_y_loss_step_1"}
    for name, data in sets.items():
        alone = trainer.evaluate(data, metric_key_prefix="eval_z")
        assert alone["eval_z_loss_step_1"] == pytest.approx(logged[f"eval_{name}_loss_step_1"])
        assert not any(key.startswith("eval_loss") for key in alone)


def test_evaluation_between_two_logs_leaves_the_numbers_of_training_to_training(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset
) -> None:
    """An evaluation must neither take what training has gathered nor add to it."""
    runs = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 3}):
        trainer = make_trainer(
            objective="rollout",
            logging_steps=4,
            trainer_options={"eval_dataset": dataset.select(range(8))},
            **evaluation,
        )
        trainer.train()
        entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
        runs.append({name for name in entry} - {"epoch"})
        assert entry["loss"] == pytest.approx(entry["loss_step_1"] + entry["loss_step_2"], rel=1e-4)
    assert runs[0] == runs[1]
