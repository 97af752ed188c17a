"""Texts that the model writes at each evaluation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from relay_hf.trainers import RelayTrainer

from .conftest import build_model
from .test_resume import losses


def test_sample_rows_are_written_at_each_evaluation_as_generate_writes_them(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset, capsys: pytest.CaptureFixture
) -> None:
    data = dataset.select(range(4))
    trainer = make_trainer(
        eval_strategy="steps", eval_steps=2, sample_rows=2, trainer_options={"eval_dataset": {"x": data}}
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_x_samples" in entry]
    assert [(entry["step"], len(entry["eval_x_samples"])) for entry in entries] == [(2, 2), (4, 2)]

    outputs = [
        trainer.model.eval().generate(
            torch.tensor([row["input_ids"][:3]]),
            max_new_tokens=9,
            unmasking_threshold=0.3,
            return_dict_in_generate=True,
        )
        for row in data.select(range(2))
    ]
    texts = [trainer.processing_class.decode(output.sequences[0, 3:]) for output in outputs]
    assert entries[-1]["eval_x_samples"] == texts
    last = [entry for entry in trainer.state.log_history if "eval_x_loss" in entry][-1]
    for kind in ("denoise", "commit", "prefill"):
        counts = [int(getattr(output, f"{kind}_forwards")[0]) for output in outputs]
        assert last[f"eval_x_sample_{kind}_forwards"] == sum(counts) / 2
    assert last["eval_x_sample_tokens_per_denoise_forward"] == pytest.approx(
        sum(output.sequences.shape[1] - 3 for output in outputs) / sum(int(o.denoise_forwards[0]) for o in outputs)
    )
    assert f"{int(outputs[0].denoise_forwards[0])} denoise, " in capsys.readouterr().out


def test_samples_leave_training_as_it_is(make_trainer: Callable[..., RelayTrainer], dataset: Dataset) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "trainer_options": {"eval_dataset": dataset.select(range(4))}}
    runs = []
    for rows in (0, 1):
        trainer = make_trainer(build_model(), sample_rows=rows, ema_decay=0.9, **options)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


def test_config_negative_sample_rows_raises(make_trainer: Callable[..., RelayTrainer]) -> None:
    with pytest.raises(ValueError, match="`sample_rows=-1` is negative"):
        make_trainer(sample_rows=-1)


class Writes(TrainerCallback):
    """Continues a prompt after each step: in the mode of training, in which transformers calls it, and in the other."""

    def __init__(self) -> None:
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert model.training
        prompt = torch.tensor([[3, 4, 5, 6, 7]])
        mine = model.generate(prompt, max_new_tokens=11)
        self.written.append((mine, model.eval().generate(prompt, max_new_tokens=11)))
        model.train()


@pytest.mark.parametrize("adapts", [False, True])
def test_generate_in_a_callback_writes_under_checkpointing_what_evaluation_writes(
    make_trainer: Callable[..., RelayTrainer], adapts: bool
) -> None:
    peft_config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapts else None
    runs = []
    for callbacks in ([], [Writes()]):
        options = {"callbacks": callbacks, "peft_config": peft_config}
        trainer = make_trainer(build_model(), gradient_checkpointing=True, trainer_options=options)
        trainer.train()
        runs.append(losses(trainer))
    assert len(callbacks[0].written) == 4
    assert all(torch.equal(mine, evaluated) for mine, evaluated in callbacks[0].written)
    assert runs[0] == runs[1]
