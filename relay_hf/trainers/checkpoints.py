"""Checkpoints that hold everything a run needs to go on, and are only used if they are whole."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints
from transformers.utils import CONFIG_NAME, logging

from ..modeling import RelayConfig
from ..modeling.loading_adapters_relay import complete_adapter
from .data.drawing import DrawingTrainer
from .ema import WeightAverage
from .whole_checkpoints import begin_checkpoint, find_problem, finish_checkpoint

WEIGHT_AVERAGE_FILE = "weight_average.safetensors"
# What a rollout buffer depends on: of the backbone, and of the relay model.
SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers")
TOKENS = ("mask_token_id", "block_size", "relay_channel")

logger = logging.get_logger(__name__)


class ResumableTrainer(DrawingTrainer):
    """Adds the rollout buffer, the place in the data and the moving average of the weights to checkpoints.

    The model in a checkpoint is what is evaluated: the average, if there is one. The weights that training goes on from
    are in a file beside it. The Trainer has no public hook for state that belongs to a checkpoint;
    `tests/trainers/test_resume.py` fails if the methods with an underscore move. What the Trainer does inside them, and
    in which order, does not matter: a checkpoint counts as unfinished until all of it, and all processes, are through.
    """

    weight_average: WeightAverage | None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer, but `True` passes over checkpoints that are not whole.

        Raises:
            ValueError: there is no whole checkpoint to resume from, the one that was named has a file that is missing
                or cannot be read, or it is of another model.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
            check_same_model(Path(resume_from_checkpoint), self.relay_config)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the Trainer, but saves the averaged weights, if there are any, and pushes nothing."""
        with nullcontext() if self.weight_average is None else self.weight_average.applied():
            super().save_model(output_dir, _internal_call=True)
        if self.args.should_save and isinstance(self.model, PeftModel):
            complete_adapter(self.model.get_base_model(), output_dir or self.args.output_dir)

    def _whole_checkpoint(self, asked: str | bool) -> str:
        if isinstance(asked, str):
            if not Path(asked).is_dir():
                raise ValueError(f"`resume_from_checkpoint={asked}` is no folder: give one, or `True` for the last.")
            if problem := find_problem(Path(asked)):
                raise ValueError(
                    f"The checkpoint `{asked}` is not whole: {problem}. Give an earlier one, or `True` for the last "
                    "that is whole."
                )
            return asked
        folder = self.args.output_dir
        for checkpoint in reversed(sort_checkpoints(folder) if Path(folder).exists() else []):
            problem = find_problem(Path(checkpoint))
            if problem is None:
                return checkpoint
            logger.warning(f"{checkpoint} is not whole ({problem}): it is passed over.")
        raise ValueError(f"{folder} has no checkpoint that is whole: leave out `resume_from_checkpoint`.")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.is_world_process_zero():
            begin_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        if not self.args.save_only_model:
            self._save_own_state(folder)
        # Older checkpoints are deleted only when all processes have written this one.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            if limit is not None:
                torch.save(self.args, folder / TRAINING_ARGS_NAME)  # the Trainer's lacks the limit
            finish_checkpoint(folder)
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _save_own_state(self, folder: Path) -> None:
        self.save_rows(folder)
        if self.weight_average is not None:
            state = self.weight_average.state_dict()  # by all processes together
            if self.is_world_process_zero():
                save_file(state, folder / WEIGHT_AVERAGE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.load_rows(Path(checkpoint))
        if self.weight_average is None:
            return
        if (path := Path(checkpoint) / WEIGHT_AVERAGE_FILE).exists():
            self.weight_average.load_state_dict(load_file(path))
        else:
            self.weight_average.restart()

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with keeps_dtypes(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with keeps_dtypes(self.model):
            super()._load_best_model()
        if self.weight_average is not None:
            # The best score was measured with the average, which training puts into the model at its end. What was just
            # loaded is the average or, under FSDP, the weights themselves.
            path = Path(self.state.best_model_checkpoint) / WEIGHT_AVERAGE_FILE
            self.weight_average.load_state_dict(load_file(path))


@contextmanager
def keeps_dtypes(model: nn.Module) -> Iterator[None]:
    """Parameters that change their type inside get it back: PEFT loads adapters into fp32, also those of QLoRA."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes.get(name, parameter.dtype):
            parameter.data = parameter.data.to(dtypes[name])


def check_same_model(checkpoint: Path, config: RelayConfig) -> None:
    """Raise if the checkpoint is of another model, whose rollout buffer would hold other tokens.

    Raises:
        ValueError: vocabulary, [MASK], blocks or shape differ.
    """
    if not (checkpoint / CONFIG_NAME).exists():  # sharded weights alone
        return
    theirs = RelayConfig.from_pretrained(checkpoint)
    for name in (*SHAPE, *TOKENS):
        mine, other = (getattr(c if name in TOKENS else c.text_config, name, None) for c in (config, theirs))
        if mine != other:
            raise ValueError(
                f"The checkpoint `{checkpoint}` is of a model with `{name}={other}`, but this one has {mine}: resume "
                "with the model that it was trained with, or start a new run from it."
            )
