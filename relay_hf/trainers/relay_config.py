"""RelayTrainerConfig: the training arguments of a relay model."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from trl import SFTConfig

from ..modeling import make_policy

Objective = Literal["relay", "relay_sg", "rollout", "masked"]


@dataclass
class RelayTrainerConfig(SFTConfig):
    r"""Arguments of `RelayTrainer`, beside all those of TRL's `SFTConfig` and transformers' `TrainingArguments`.

    Args:
        objective: what is learned (arXiv 2605.22967, Algorithm 1 and its ablations).
            `"relay"`: K denoising steps, the state is carried and gradients flow through it.
            `"relay_sg"`: the state is carried, gradients stop between steps.
            `"rollout"`: K denoising steps without a state.
            `"masked"`: plain masked diffusion, one step from a uniformly drawn fraction of masks.
        rollout_steps: K, denoising steps per optimizer micro-batch; their losses are summed. `"masked"` has one.
        unmasking_policy: reveal rule of the rollout, the same objects as in `generate`.
        unmasking_threshold: what the policy compares with.
        threshold_jitter: standard deviation of Gaussian noise on the threshold, drawn per step (Sudoku recipe: 0.1).
            Evaluation uses the threshold as it is.
        relay_learning_rate: learning rate of the channel; `None` = `learning_rate`.
        ema_decay: decay of an exponential moving average of the weights, ramped up as (1 + n) / (10 + n). The average
            is used for evaluation and left in the model when training ends; checkpoints in between hold the weights
            themselves, and the average in a file beside them. `None` = no average.

    Raises:
        ValueError: a value that cannot be trained with.
    """

    objective: Objective = field(default="relay", metadata={"help": "relay, relay_sg, rollout or masked."})
    rollout_steps: int = field(default=2, metadata={"help": "K, denoising steps per rollout."})
    unmasking_policy: str = field(default="confidence_threshold", metadata={"help": "Reveal rule of the rollout."})
    unmasking_threshold: float = field(default=0.85, metadata={"help": "What the reveal rule compares with."})
    threshold_jitter: float = field(default=0.0, metadata={"help": "Standard deviation of noise on the threshold."})
    relay_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the channel."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of the moving average of the weights."})

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            # The libraries' defaults expect a GPU; a plain configuration should run on a laptop, and quietly.
            self.bf16 = False if self.bf16 is None else self.bf16
            self.dataloader_pin_memory = False
        super().__post_init__()
        if self.objective not in get_args(Objective):
            raise ValueError(f"`objective={self.objective!r}` is unknown: choose one of {list(get_args(Objective))}.")
        if self.rollout_steps < 1:
            raise ValueError(f"`rollout_steps={self.rollout_steps}` must be at least 1: a rollout has K >= 1 steps.")
        make_policy(self.unmasking_policy, self.unmasking_threshold)
        if not self.threshold_jitter >= 0:
            raise ValueError(f"`threshold_jitter={self.threshold_jitter}` is a standard deviation: it must be >= 0.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay={self.ema_decay}` must lie strictly between 0 and 1; `None` switches it off.")
        if self.ema_decay is not None and self.load_best_model_at_end and self.save_only_model:
            raise ValueError(
                "`save_only_model=True` drops the moving average that `load_best_model_at_end=True` must restore: set "
                "one of them to False, or `ema_decay=None`."
            )
        if self.packing or self.eval_packing or self.padding_free:
            raise ValueError(
                "`packing`, `eval_packing` or `padding_free` is True: the relay state belongs to one row and would "
                "cross documents. Set all three to False."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor={self.label_smoothing_factor}` has no effect on these losses: leave it out."
            )
        if self.relay_learning_rate is not None and not self.relay_learning_rate >= 0:
            raise ValueError(f"`relay_learning_rate={self.relay_learning_rate}` is negative: give 0 or more, or None.")
        if self.loss_type != "nll":
            raise ValueError(
                f"`loss_type={self.loss_type!r}` has no meaning here: `objective` names the loss; leave it out."
            )

    @property
    def carries_state(self) -> bool:
        """Whether the objective uses the relay channel."""
        return self.objective in ("relay", "relay_sg")
