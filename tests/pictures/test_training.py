"""The picture of a training run."""

from pathlib import Path

import pytest

from relay_hf.pictures.training import logged, plot_training

HISTORY = [
    {"step": 5, "loss": 3.0, "relay_weight_norm": 0.0},
    {"step": 5, "eval_loss": 3.1},
    {"step": 10, "loss": "2.5", "relay_weight_norm": 0.2},
    {"step": 10, "eval_loss": 3.0, "eval_sample_tokens_per_denoise_forward": 1.5},
    {"step": 10, "train_runtime": 1.0, "train_loss": 2.7},
]


def test_logged_values_are_those_of_the_name() -> None:
    assert logged(HISTORY, "loss") == [(5, 3.0), (10, 2.5)]
    assert logged(HISTORY, "eval_loss") == [(5, 3.1), (10, 3.0)]
    assert logged(HISTORY, "nothing") == []


@pytest.mark.parametrize("entries", [HISTORY, HISTORY[1:2]])
def test_picture_is_written_into_a_new_folder(entries: list, tmp_path: Path) -> None:
    path = plot_training(entries, tmp_path / "new" / "training.png", "Training of x")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_history_without_losses_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no losses"):
        plot_training(HISTORY[4:], tmp_path / "training.png")
    assert not list(tmp_path.iterdir())
