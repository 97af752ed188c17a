"""What a forward pass and what `generate` return, and what a forward pass offers a channel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .versions_relay import CacheOutput


@dataclass
class RelayOutput(CacheOutput):
    """Output of one forward pass; every tensor with a position axis is position-aligned.

    Args:
        loss: mean cross-entropy over the positions whose label is not -100, if `labels` were given.
        logits: (B, L, V), or (N, V) if `logits_to_keep` was a mask of N positions. Entry i scores the token AT i.
        token_losses: (N,) fp32 cross-entropy of each kept position's target, instead of logits, if given `targets`.
        confidence: (N,) fp32 probability of each kept position's best token that is not [MASK], likewise.
        head_inputs: (B, L, D) or (N, D), what the head would turn into the logits, if `unscored` was asked for.
        relay_state: (B, L, `config.relay_state_width`), what the channel carries to the next denoising step; `None`
            without a channel.
        inputs_embeds: (B, L, D) embeddings of the input, before the channel.
        cache: the cache, if one was used.
        hidden_states, attentions: of the backbone, not shifted, if asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_losses: Tensor | None = None
    confidence: Tensor | None = None
    head_inputs: Tensor | None = None
    relay_state: Tensor | None = None
    inputs_embeds: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class RelayGenerateHistory(ModelOutput):
    """Which forward revealed which token of `sequences`; a row's entries do not depend on the rest of the batch.

    Two kinds of positions have `revealed_at == 0`, and `given` distinguishes them: what the caller wrote is given; the
    first token of a block of a token-shift model may be known without a denoise forward of its own, because the prefill
    or commit before it has scored it. Such a token is known as soon as all positions before it are.

    Args:
        revealed_at: (B, L) long, number k >= 1 of the row's own denoise forward that revealed the position; 0 if no
            denoise forward did; -1 at padding, before a prompt or behind a row's end.
        confidence: (B, L) fp32 probability the token had when it was chosen; 0 where nothing was chosen.
        given: (B, L) bool, tokens of the prompt and clues of the canvas.
        denoise_forwards: (B,) long, as in `RelayGenerateOutput`: more than the largest `revealed_at` of a row whose
            last forwards revealed tokens that a stop string then cut off.
    """

    revealed_at: Tensor | None = None
    confidence: Tensor | None = None
    given: Tensor | None = None
    denoise_forwards: Tensor | None = None


@dataclass
class RelayGenerateOutput(CacheOutput):
    """Output of `generate(..., return_dict_in_generate=True)`.

    Args:
        sequences: (B, L) prompt and new tokens; padded behind the stop token.
        denoise_forwards: (B,) forwards in which the row still had a masked position to fill; with `relay_start="self"`
            also those that only start the relay state of a block.
        commit_forwards: (B,) forwards that wrote a finished block of the row to the cache.
        prefill_forwards: (B,) forwards that wrote the row's prompt to the cache.
        reference_forwards: (B,) forwards of the `reference_model` over the row's text, with `relay_start="reference"`.
        tokens_per_forward: (B,) tokens the row gained (stop token included) per forward of any kind of the model
            itself; those of a reference model, which costs something else, are left out.
        cache: the cache as the last forward left it, rows that finished earlier removed.
        history: when each token was revealed, if `output_history=True`.
    """

    sequences: Tensor | None = None
    denoise_forwards: Tensor | None = None
    commit_forwards: Tensor | None = None
    prefill_forwards: Tensor | None = None
    reference_forwards: Tensor | None = None
    tokens_per_forward: Tensor | None = None
    cache: Cache | None = None
    history: RelayGenerateHistory | None = None


class Readings(NamedTuple):
    """What a forward pass offers a channel.

    Attributes:
        read_out: (B, L, D) position-aligned hidden states of `config.relay_layer`.
        head_inputs: (B, L, D), what the head turns into the position-aligned logits.
        is_masked: (B, L) bool, where the input was [MASK].
        head: (N, D) -> (N, V) logits.
        embeddings: module that looks up the input tokens.
        masks: how many positions are masked, at most; None = only the device knows.
    """

    read_out: Tensor
    head_inputs: Tensor
    is_masked: Tensor
    head: Callable[[Tensor], Tensor]
    embeddings: nn.Module
    masks: int | None = None

    def places(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the masked positions, (N,) each, in row-major order.

        With `masks` it does not wait for the device, and where these are too many, (0, 0) fills up.
        """
        if self.masks is None:
            rows, columns = self.is_masked.nonzero().unbind(-1)
        else:
            rows, columns = torch.nonzero_static(self.is_masked, size=self.masks, fill_value=0).unbind(-1)
        return rows, columns
