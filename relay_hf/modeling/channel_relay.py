"""Relay channels: what is carried from one denoising step to the next, and how it enters the embeddings.

A channel is a small module with one interface:

- `initial_state(rows, length)`: the state of the first step, or None for "nothing is injected";
- `inject(embeds, receives, state)`: the embeddings of the next step. It gets the embeddings rather than returning a
  delta, because a channel may interpolate instead of adding;
- `update(read_out)`: the state a forward pass leaves behind.

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

    def inject(self, embeds: Tensor, receives: Tensor, state: Tensor) -> Tensor:
        raise ValueError(
            "A `relay_state` was given to a model with `relay_channel='none'`: leave it out, or use a model with a channel."
        )

    def update(self, read_out: Tensor) -> None:
        return None


class LayerNormChannel(nn.Module):
    """Relay: adds a LayerNorm of the carried hidden state, `e_i + LN(h_i)` (arXiv 2605.22967, Algorithm 1).

    The parameters are fp32 whatever the model's dtype is, and so is the arithmetic: with the published learning rate a
    zero-initialised weight stays below about 1e-3, where bf16 would lose most updates.
    """

    def __init__(self, config: RelayConfig) -> None:
        super().__init__()
        self.starts_from_zeros = config.relay_initial_state == "zeros"
        self.initial_weight = {"zeros": 0.0, "ones": 1.0}[config.relay_init]
        self.norm = nn.LayerNorm(config.text_config.hidden_size, eps=config.relay_norm_eps, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Writes the initial values; respects parameters that came from a checkpoint."""
        init.constant_(self.norm.weight, self.initial_weight)
        init.zeros_(self.norm.bias)

    def initial_state(self, rows: int, length: int) -> Tensor | None:
        """State of the first denoising step, (B, L, D) fp32, or None if nothing is to be injected."""
        if not self.starts_from_zeros:
            return None
        return torch.zeros(rows, length, *self.norm.normalized_shape, device=self.norm.weight.device)

    def inject(self, embeds: Tensor, receives: Tensor, state: Tensor) -> Tensor:
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
                f"`relay_state` has shape {tuple(state.shape)}, but the embeddings have {tuple(embeds.shape)}: pass the "
                "state that the previous forward returned for the same rows and positions."
            )
        norm = self.norm
        signal = F.layer_norm(state.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        return torch.where(receives[..., None], embeds + signal.to(embeds.dtype), embeds)

    def update(self, read_out: Tensor) -> Tensor:
        """The state is the hidden state itself, (B, L, D)."""
        return read_out


CHANNELS = {"none": lambda config: NoChannel(), "layer_norm": LayerNormChannel}


def make_channel(config: RelayConfig) -> NoChannel | LayerNormChannel:
    """Builds the channel that `config.relay_channel` names."""
    return CHANNELS[config.relay_channel](config)
