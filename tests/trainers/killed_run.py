"""A training run that is killed."""

import os
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from relay_hf.trainers import checkpoints

from .conftest import build_trainer

SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "threshold_jitter": 0.2,
    "ema_decay": 0.9,
    "relay_learning_rate": 1e-2,
    "rollout_steps": 3,
    "gradient_window": 2,
    "gradient_accumulation_steps": 2,
}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAfterStep(TrainerCallback):
    """Dies after the fifth step, between two checkpoints."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            kill()


def train_and_die(folder: Path, moment: str) -> None:
    """Trains into a folder and kills this process at a moment: `"step"`, `"save"` or `"end"`."""
    trainer = build_trainer(folder, **SETTINGS)
    if moment == "step":
        trainer.add_callback(KillAfterStep())
    else:
        # The second checkpoint has either nothing yet, or every file, but is not known to.
        place, name = {"save": (trainer.buffer, "state_dict"), "end": (checkpoints, "finish_checkpoint")}[moment]
        function = getattr(place, name)

        def die_while_saving(*args: Any) -> Any:
            if trainer.state.global_step == 4:
                kill()
            return function(*args)

        setattr(place, name, die_while_saving)
    trainer.train()
