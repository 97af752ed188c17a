"""The model: configuration, channel, cache, decoding and the model class. Knows nothing of training.

Importing it registers `RelayConfig` and `RelayForMaskedDiffusion` with the Auto classes of transformers.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .cache_relay import RelayCache
from .channel_relay import Channel, DistributionChannel, Readings, register_channel
from .configuration_relay import RelayConfig
from .generation_options_relay import DecodingOptions
from .modeling_relay import RelayForMaskedDiffusion
from .outputs_relay import RelayGenerateHistory, RelayGenerateOutput, RelayOutput
from .unmasking_relay import (
    Bounds,
    ConfidenceBudget,
    ConfidenceThreshold,
    UnmaskingPolicy,
    make_policy,
    register_policy,
)

__all__ = [
    "Bounds",
    "Channel",
    "ConfidenceBudget",
    "ConfidenceThreshold",
    "DecodingOptions",
    "DistributionChannel",
    "Readings",
    "RelayCache",
    "RelayConfig",
    "RelayForMaskedDiffusion",
    "RelayGenerateHistory",
    "RelayGenerateOutput",
    "RelayOutput",
    "UnmaskingPolicy",
    "make_policy",
    "register_channel",
    "register_policy",
]

AutoConfig.register(RelayConfig.model_type, RelayConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
    _auto_class.register(RelayConfig, RelayForMaskedDiffusion, exist_ok=True)
