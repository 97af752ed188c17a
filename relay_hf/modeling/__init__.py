"""The model: configuration, channel, cache, decoding and the model class. Knows nothing of training."""

from .cache_relay import RelayCache
from .configuration_relay import RelayConfig
from .modeling_relay import RelayForMaskedDiffusion
from .outputs_relay import RelayGenerateHistory, RelayGenerateOutput, RelayOutput
from .reveal_relay import ConfidenceBudget, ConfidenceThreshold, make_policy

__all__ = [
    "ConfidenceBudget",
    "ConfidenceThreshold",
    "RelayCache",
    "RelayConfig",
    "RelayForMaskedDiffusion",
    "RelayGenerateHistory",
    "RelayGenerateOutput",
    "RelayOutput",
    "make_policy",
]
