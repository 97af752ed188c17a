"""Random masks of plain masked diffusion."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..modeling import RelayConfig
from .rows import RolloutRows

# Keeps every mask probability away from 0, as in Fast-dLLM v2: p = (1 - eps) t + eps.
MINIMUM_MASK_PROBABILITY = 1e-3


def mask_uniformly(
    rows: RolloutRows, config: RelayConfig, generators: Sequence[torch.Generator] | None = None
) -> RolloutRows:
    """Masks each learned position with a probability drawn uniformly per row, or per block if the model has blocks.

    Args:
        rows: fresh rows (their own masks are replaced).
        config: the model's configuration.
        generators: one source of randomness per row; None = torch's global one, which the Trainer saves and restores.

    Returns:
        The rows with at least one mask each, where there is anything to learn. Source: Algorithm 1, "MLM" baseline.
    """
    count, length = rows.clean_ids.shape
    device = rows.clean_ids.device
    width = config.block_size or length

    def uniform(columns: int) -> Tensor:
        # Drawn on the CPU: the same numbers on every device.
        if generators is None:
            return torch.rand(count, columns).to(device)
        return torch.stack([torch.rand(columns, generator=generator) for generator in generators]).to(device)

    time = uniform(-(-length // width)).repeat_interleave(width, dim=1)[:, :length]  # (B, L)
    probability = (1 - MINIMUM_MASK_PROBABILITY) * time + MINIMUM_MASK_PROBABILITY
    draw = uniform(length)
    hidden = rows.maskable & (draw < probability)
    # A row without a mask would teach nothing: hide the position that came closest.
    closest = (draw - probability).masked_fill(~rows.maskable, torch.inf).argmin(-1, keepdim=True)
    lucky = torch.zeros_like(hidden).scatter(-1, closest, ~hidden.any(-1, keepdim=True)) & rows.maskable
    noisy_ids = torch.where(hidden | lucky, config.mask_token_id, rows.clean_ids)
    return replace(rows, noisy_ids=noisy_ids)
