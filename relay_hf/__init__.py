"""relay_hf: learned relay representations for masked diffusion language models, on the Hugging Face stack.

Importing the package registers `RelayConfig` and `RelayForMaskedDiffusion` with the Auto classes of transformers.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .modeling import RelayCache, RelayConfig, RelayForMaskedDiffusion, RelayGenerateOutput, RelayOutput
from .version import __version__

__all__ = [
    "RelayCache",
    "RelayConfig",
    "RelayForMaskedDiffusion",
    "RelayGenerateOutput",
    "RelayOutput",
    "__version__",
]

AutoConfig.register(RelayConfig.model_type, RelayConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
    _auto_class.register(RelayConfig, RelayForMaskedDiffusion, exist_ok=True)
