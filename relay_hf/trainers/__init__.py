"""Training: objectives, rollouts, the buffer and the trainer. May import `modeling`, never the other way round."""

from typing import TYPE_CHECKING

from ..startup.lazy_names import lazy_names

if TYPE_CHECKING:
    from .relay_config import Objective, RelayTrainerConfig
    from .relay_trainer import RelayTrainer

__all__ = ["Objective", "RelayTrainer", "RelayTrainerConfig"]

__getattr__ = lazy_names(
    __name__,
    {"Objective": "relay_config", "RelayTrainer": "relay_trainer", "RelayTrainerConfig": "relay_config"},
)
