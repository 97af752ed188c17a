"""relay_hf: learned relay representations for masked diffusion language models, on the Hugging Face stack.

Importing the package registers `RelayConfig` and `RelayForMaskedDiffusion` with the Auto classes of transformers.
"""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .modeling import RelayCache, RelayConfig, RelayForMaskedDiffusion, RelayGenerateOutput, RelayOutput
from .version import __version__

if TYPE_CHECKING:
    from .trainers import RelayTrainer, RelayTrainerConfig

__all__ = [
    "RelayCache",
    "RelayConfig",
    "RelayForMaskedDiffusion",
    "RelayGenerateOutput",
    "RelayOutput",
    "RelayTrainer",
    "RelayTrainerConfig",
    "__version__",
]

AutoConfig.register(RelayConfig.model_type, RelayConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
    _auto_class.register(RelayConfig, RelayForMaskedDiffusion, exist_ok=True)


def __getattr__(name: str) -> Any:
    """The trainer is imported when it is first asked for: who only loads a model does not wait for TRL and PEFT."""
    if name in ("RelayTrainer", "RelayTrainerConfig"):
        from . import trainers

        return getattr(trainers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
