"""Training: objectives, rollouts, the buffer and the trainer. May import `modeling`, never the other way round."""

from typing import TYPE_CHECKING

from ..startup.lazy_names import lazy_names

if TYPE_CHECKING:
    from .objectives import Recipe, register_objective
    from .relay_config import RelayTrainerConfig
    from .relay_trainer import RelayTrainer
    from .rollouts.rows import RolloutRows

__all__ = ["Recipe", "RelayTrainer", "RelayTrainerConfig", "RolloutRows", "register_objective"]

__getattr__ = lazy_names(__name__)
