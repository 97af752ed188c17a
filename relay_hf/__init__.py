"""relay_hf: learned relay representations for masked diffusion language models, on the Hugging Face stack.

Where the package is imported, the Auto classes of transformers know `RelayConfig` and `RelayForMaskedDiffusion`.
"""

from typing import TYPE_CHECKING

from .startup.lazy_names import lazy_names
from .startup.registration import register_with_transformers
from .version import __version__

if TYPE_CHECKING:
    from .conversion import convert
    from .hub import PushError, push
    from .modeling import (
        RelayCache,
        RelayConfig,
        RelayForMaskedDiffusion,
        RelayGenerateHistory,
        RelayGenerateOutput,
        RelayOutput,
        register_channel,
        register_policy,
    )
    from .pictures.denoising import plot_denoising
    from .pictures.timeline import show_denoising
    from .trainers import RelayTrainer, RelayTrainerConfig, register_objective

__all__ = [
    "PushError",
    "RelayCache",
    "RelayConfig",
    "RelayForMaskedDiffusion",
    "RelayGenerateHistory",
    "RelayGenerateOutput",
    "RelayOutput",
    "RelayTrainer",
    "RelayTrainerConfig",
    "__version__",
    "convert",
    "plot_denoising",
    "push",
    "register_channel",
    "register_objective",
    "register_policy",
    "show_denoising",
]

# The command line does not wait for torch, nor a program that only loads a model for TRL, PEFT and matplotlib.
__getattr__ = lazy_names(__name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
