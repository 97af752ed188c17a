"""What a forward pass and what `generate` return."""

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput


@dataclass
class RelayOutput(ModelOutput):
    """Output of one forward pass; every tensor with a position axis is position-aligned.

    Args:
        loss: mean cross-entropy over the positions whose label is not -100, if `labels` were given.
        logits: (B, L, V), or (N, V) if `logits_to_keep` was a mask of N positions. Entry i scores the token AT i.
        token_losses: (N,) fp32 cross-entropy of each kept position's target, instead of logits, if given `targets`.
        confidence: (N,) fp32 probability of each kept position's best token that is not [MASK], likewise.
        relay_state: (B, L, D), what the channel carries to the next denoising step; `None` without a channel.
        inputs_embeds: (B, L, D) embeddings of the input, before the channel.
        past_key_values: the cache, if one was used.
        hidden_states, attentions: of the backbone, not shifted, if asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_losses: Tensor | None = None
    confidence: Tensor | None = None
    relay_state: Tensor | None = None
    inputs_embeds: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class RelayGenerateOutput(ModelOutput):
    """Output of `generate(..., return_dict_in_generate=True)`.

    Args:
        sequences: (B, L) prompt and new tokens; padded behind the stop token.
        denoise_forwards: (B,) forwards in which the row still had a masked position to fill.
        commit_forwards: (B,) forwards that wrote a finished block of the row to the cache.
        prefill_forwards: (B,) forwards that wrote the row's prompt to the cache.
        tokens_per_forward: (B,) tokens the row gained (stop token included) per forward of any kind.
        past_key_values: the cache as the last forward left it, rows that finished earlier removed.
    """

    sequences: Tensor | None = None
    denoise_forwards: Tensor | None = None
    commit_forwards: Tensor | None = None
    prefill_forwards: Tensor | None = None
    tokens_per_forward: Tensor | None = None
    past_key_values: Cache | None = None
