"""Trains tiny models in several processes on CPU, for `test_multiprocess.py`. Started by `accelerate launch`:

    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 2 \\
        -m tests.trainers.multiprocess.train OUTPUT_FOLDER '{"relay": {"objective": "relay"}}'

Each named run is one training; its value holds arguments of `RelayTrainerConfig` and, if wanted, `model` (arguments of
`build_model`), `reference` (those of the reference model), `resume` (a checkpoint) and `evaluate` (rows). Process 0
writes NAME.json with losses and scores, and NAME.safetensors with the full gradients of the first steps and the final
weights.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from relay_hf.testing import byte_tokenizer
from relay_hf.trainers import RelayTrainer, RelayTrainerConfig

from ..conftest import build_model, build_rows

DEFAULTS = {
    "max_steps": 3,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "unmasking_threshold": 0.5,
    "staggered_start": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
}
STEPS_WITH_GRADIENTS = 2


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, from all processes if it is sharded; as new, so that it can be saved."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


class Recorder(TrainerCallback):
    """Keeps the gradients of the first steps."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step >= STEPS_WITH_GRADIENTS:
            return
        for name, parameter in model.named_parameters():
            gradient = parameter if parameter.grad is None else parameter.grad
            scale = 0.0 if parameter.grad is None else 1.0
            key = f"gradient.{state.global_step}.{name.removeprefix('module.')}"
            self.tensors[key] = full(gradient) * scale


def dataset(count: int, seed: int = 0) -> Dataset:
    rows = build_rows(count, seed=seed)
    # Three of four rows have a single token to learn: processes differ in what they average over, and in when they
    # finish, whether they are dealt rows or pairs of rows.
    for first in range(0, count, 4):
        rows["labels"][first : first + 3, :-1] = -100
    return Dataset.from_dict({name: rows[name].tolist() for name in ("input_ids", "labels")})


def run(name: str, folder: Path, options: dict[str, Any]) -> None:
    options = dict(options)
    resume, evaluate = options.pop("resume", None), options.pop("evaluate", 0)
    model = build_model(**options.pop("model", {}))
    reference = build_model(**options.pop("reference")) if "reference" in options else None
    if options.pop("pretend_gpus", "ACCELERATE_USE_FSDP" in os.environ):
        # accelerate looks for FSDP only among processes with a GPU each; FSDP2 itself does not mind.
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        options = {"accelerator_config": {"use_configured_state": True}, **options}
    recorder = Recorder()
    trainer = RelayTrainer(
        model,
        RelayTrainerConfig(**{**DEFAULTS, "output_dir": str(folder / name), **options}),
        train_dataset=dataset(32),
        eval_dataset=dataset(evaluate, seed=1) if evaluate else None,
        processing_class=byte_tokenizer(pad_token="!", eos_token='"', mask_token=None),
        callbacks=[recorder],
        reference_model=reference,
    )
    trainer.train(resume_from_checkpoint=str(folder / resume) if resume else None)
    score = trainer.evaluate()["eval_loss"] if evaluate else None
    weights = {f"weight.{name}": full(p) for name, p in trainer.model.named_parameters()}
    if trainer.is_world_process_zero():
        report = {
            "kind": str(trainer.accelerator.distributed_type),
            "processes": trainer.args.world_size,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "grad_norms": [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry],
            "score": score,
            "scores": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
            "checkpoint": get_last_checkpoint(str(folder / name)),
            "log": trainer.state.log_history,
        }
        (folder / f"{name}.json").write_text(json.dumps(report))
        save_file({**recorder.tensors, **weights}, folder / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, options in json.loads(sys.argv[2]).items():
        run(name, Path(sys.argv[1]), options)
