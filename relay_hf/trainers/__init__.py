"""Training: objectives, rollouts, the buffer and the trainer. May import `modeling`, never the other way round."""

from .relay_config import Objective, RelayTrainerConfig
from .relay_trainer import RelayTrainer

__all__ = ["Objective", "RelayTrainer", "RelayTrainerConfig"]
