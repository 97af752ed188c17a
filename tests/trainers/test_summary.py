"""The summary of a run: what it counts is what is there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.trainers import RelayTrainer
from relay_hf.trainers.summary import optimizer_bytes

from ..conftest import text_config


def test_summary_counts_rows_tokens_and_what_is_learned(make_trainer: Callable[..., RelayTrainer]) -> None:
    rows = [
        {"prompt": "ab", "completion": "cd"},  # with the end of the text, five tokens
        {"prompt": "ab", "completion": "cdefgh"},  # cut to six
        {"prompt": "abcdefgh", "completion": "i"},  # nothing of the completion is left
    ]
    model = RelayForMaskedDiffusion(
        RelayConfig(text_config=text_config(vocab_size=257), block_size=4, mask_token_id=256)
    )
    trainer = make_trainer(model, Dataset.from_list(rows), max_length=6, objective="rollout", max_steps=3)
    text = trainer.summary()
    assert "2 rows, 11 tokens, 7 of them learned; the longest row has 6" in text
    assert "1 rows fill `max_length=6`" in text
    assert "1 of 3 rows left out" in text
    assert (
        "5 tokens, 3 of them learned: masked at first, and revealed step by step; 3 more [MASK] fill the last" in text
    )
    assert "visible 'ab'" in text
    assert "learned 'cd" in text
    assert "rollout (several denoising steps" in text
    assert "3 of 4 rows (4 per process), each of which stays for several steps" in text


def test_steps_of_a_run_that_counts_epochs_are_called_an_estimate(make_trainer: Callable[..., RelayTrainer]) -> None:
    """64 rows twice, four at a time, each for two rollouts of two steps: a block has four positions."""
    text = make_trainer(max_steps=-1, num_train_epochs=2).summary()
    assert "about 64 of 4 rows (4 per process), until every row was revealed in each of 2 epochs" in text


@pytest.mark.parametrize("options", [{}, {"optim": "adafactor"}, {"optim": "sgd"}, {"optim_args": "amsgrad=True"}])
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
def test_optimizer_bytes_are_those_of_the_optimizer_after_a_step(
    make_trainer: Callable[..., RelayTrainer], options: dict[str, Any], peft_config: LoraConfig | None
) -> None:
    trainer = make_trainer(max_steps=1, trainer_options={"peft_config": peft_config}, **options)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    counted = optimizer_bytes(trainer, trained)
    trainer.train()
    states = trainer.optimizer.state.values()
    assert counted == sum(t.nbytes for state in states for t in state.values() if isinstance(t, torch.Tensor))


def test_summary_of_lora_counts_what_is_trained(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer(trainer_options={"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}, ema_decay=0.9)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in trainer.model.parameters())
    text = trainer.summary()
    assert f"{trained:,} trained of {everything:,}" in text
    assert "32 of them the relay channel's" in text
    assert f"moving average {4 * trained / 2**20:,.1f} MiB" in text


def test_summary_of_a_stream_says_that_it_is_one(make_trainer: Callable[..., RelayTrainer], dataset: Dataset) -> None:
    text = make_trainer(data=dataset.to_iterable_dataset(), max_steps=5).summary()
    assert "a stream, whose rows are read" in text
    assert "5 of 4 rows (4 per process)" in text
