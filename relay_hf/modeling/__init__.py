"""The model: configuration, channel, forward, cache and decoding. It knows nothing of training.

The folder is flat, because the Hub copies its files next to a checkpoint: prefixes of file names are its folders.

- `configuration`: every switch of a model. `registry`: names of channels and policies, also those of other packages.
- `modeling`: one forward of backbone, `channel` (what is carried) and `head` (logits, losses, best tokens, in tiles),
  with the pattern of `attention`, which `attention_blocks` computes without dense masks. `prefix`: what the forward
  sees before its own positions; `cache`: committed text and the block in work, with `cache_layers`; `outputs`: what
  forward and `generate` return.
- `generation`: `generate` of transformers with block diffusion. Its `options` are parsed once, with the `processors` of
  transformers; the `grid` lines rows up, `given` keeps what belongs to one call; `blocks` is the loop, `candidates` and
  `steps` what a step scores, `tokens` what is chosen, `stopping` what ends a row. `start` and `shortcuts` are options:
  the first state of a block, the sub-block cache. `static` is the loop with steps of fixed shapes, for which
  `cache_static` is the memory.
- `unmasking`: policies, shared by decoding and training.
- `loading_families`, `loading_adapters`, `loading_backbones`, `loading_files`: configurations and names of other
  libraries, adapters, what a backbone must offer, damaged files.
- `versions`: what differs between versions of transformers.

Importing it registers `RelayConfig` and `RelayForMaskedDiffusion` with the Auto classes of transformers.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .cache_relay import RelayCache
from .channel_relay import Channel, DistributionChannel, register_channel
from .configuration_relay import RelayConfig
from .generation_options_relay import DecodingOptions
from .modeling_relay import RelayForMaskedDiffusion
from .outputs_relay import Readings, RelayGenerateHistory, RelayGenerateOutput, RelayOutput
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
