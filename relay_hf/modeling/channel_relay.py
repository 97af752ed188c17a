"""Relay channels: what is carried from one denoising step to the next, and how it enters the embeddings.

A channel is a small module with one interface:

- `initial_state(rows, length)`: the state of the first step, or None for "nothing is injected";
- `forward(embeds, receives, state)`: the embeddings of the next step. It gets the embeddings rather than returning a
  delta, because a channel may interpolate instead of adding;
- `next_state(read_out)`: the state a forward pass leaves behind. (Not called `update`: PEFT wraps the channel in a
  module that has an `update` of its own.)

Legend: B rows, L positions, D hidden size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_relay import RelayConfig


class NoChannel(nn.Module):
    """Forgets everything between steps: a plain masked diffusion model."""

    def initial_state(self, rows: int, length: int) -> None:
        return None

    def forward(self, embeds: Tensor, receives: Tensor, state: Tensor) -> Tensor:
        raise ValueError(
            "A `relay_state` was given to a model with `relay_channel='none'`: leave it out, or use one with a channel."
        )

    def next_state(self, read_out: Tensor) -> None:
        return None


class RelayLayerNorm(nn.LayerNorm):
    """A LayerNorm in fp32 whose weight starts at `initial_weight` (0 makes a fresh channel an exact no-op).

    The initial values are written here because transformers builds models on the meta device and initialises later, and
    then only modules that own parameters.
    """

    def __init__(self, size: int, eps: float, initial_weight: float) -> None:
        self.initial_weight = initial_weight
        super().__init__(size, eps=eps, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Writes the initial values; respects parameters that came from a checkpoint."""
        init.constant_(self.weight, self.initial_weight)
        init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalises in fp32, whatever the dtypes of input and parameters have become."""
        return F.layer_norm(input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class LayerNormChannel(nn.Module):
    """Relay: adds a LayerNorm of the carried hidden state, `e_i + LN(h_i)` (arXiv 2605.22967, Algorithm 1).

    The parameters are fp32 whatever the model's dtype is, and so is the arithmetic: with the published learning rate a
    zero-initialised weight stays below about 1e-3, where bf16 would lose most updates.
    """

    def __init__(self, config: RelayConfig) -> None:
        super().__init__()
        self.starts_from_zeros = config.relay_initial_state == "zeros"
        initial_weight = {"zeros": 0.0, "ones": 1.0}[config.relay_init]
        self.norm = RelayLayerNorm(config.text_config.hidden_size, config.relay_norm_eps, initial_weight)

    def initial_state(self, rows: int, length: int) -> Tensor | None:
        """State of the first denoising step, (B, L, D) fp32, or None if nothing is to be injected."""
        if not self.starts_from_zeros:
            return None
        return torch.zeros(rows, length, *self.norm.normalized_shape, device=self.norm.weight.device)

    def forward(self, embeds: Tensor, receives: Tensor, state: Tensor) -> Tensor:
        """Adds the normalised state where `receives`.

        Args:
            embeds: (B, L, D) token embeddings.
            receives: (B, L) bool, positions that get the state.
            state: (B, L, D) position-aligned state, any float dtype.

        Returns:
            (B, L, D) in the dtype of `embeds`.

        Raises:
            ValueError: `state` and `embeds` differ in shape.
        """
        if state.shape != embeds.shape:
            raise ValueError(
                f"`relay_state` has shape {tuple(state.shape)}, but the embeddings have {tuple(embeds.shape)}: pass "
                "the state that the previous forward returned for the same rows and positions."
            )
        return torch.where(receives[..., None], embeds + self.norm(state).to(embeds.dtype), embeds)

    def next_state(self, read_out: Tensor) -> Tensor:
        """The state is the hidden state itself, (B, L, D)."""
        return read_out


def in_scope(config: RelayConfig, is_masked: Tensor) -> Tensor:
    """(B, L) bool, positions that the state enters under `config.relay_scope`, given those that are masked."""
    return torch.ones_like(is_masked) if config.relay_scope == "all" else is_masked


def make_channel(config: RelayConfig) -> NoChannel | LayerNormChannel:
    """Builds the channel that `config.relay_channel` names."""
    return NoChannel() if config.relay_channel == "none" else LayerNormChannel(config)
