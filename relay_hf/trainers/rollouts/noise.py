"""Random masks: of plain masked diffusion, of complementary pairs, and of a rollout buffer's cold start."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...modeling import RelayConfig
from .rows import RolloutRows, to_device

# Keeps every mask probability away from 0, as in Fast-dLLM v2: p = (1 - eps) t + eps.
MINIMUM_MASK_PROBABILITY = 1e-3


def mask_uniformly(
    rows: RolloutRows,
    config: RelayConfig,
    generators: Sequence[torch.Generator] | None = None,
    process: int = 0,
    processes: int = 1,
) -> RolloutRows:
    """Masks each learned position with a probability drawn uniformly per row, or per block if the model has blocks.

    Args:
        rows: fresh rows (their own masks are replaced).
        config: the model's configuration.
        generators: one source of randomness per row; None = torch's global one, which the Trainer saves and restores.
        process, processes: index of this process, and how many there are. All start from one seed, so each draws for
            all of them and takes its own part; else their rows would have the same masks.

    Returns:
        The rows with at least one mask each, where there is anything to learn. A row's masks do not depend on its
        padding. Source: Algorithm 1, "MLM" baseline.
    """
    count, length = rows.clean_ids.shape
    # Drawn on the CPU: the same numbers on every device. In pairs, so that longer padding only adds numbers at the end.
    if generators is None:
        draws = torch.rand(processes, count, length, 2)[process]
    else:
        draws = torch.stack([torch.rand(length, 2, generator=generator) for generator in generators])
    draw, time = to_device(draws, rows.clean_ids.device).unbind(-1)  # (B, L)
    width = config.block_size or length
    time = time[:, ::width].repeat_interleave(width, dim=1)[:, :length]
    return _mask(rows, (1 - MINIMUM_MASK_PROBABILITY) * time + MINIMUM_MASK_PROBABILITY, draw)


def stagger(rows: RolloutRows) -> RolloutRows:
    """Rows as if they had come in one after the other: row i of B with about (B - i) / B of its positions masked.

    A row with a trace has (B - i) / B of its trace before it.
    """
    count = len(rows)
    fraction = torch.arange(count, 0, -1, device=rows.masked.device)[:, None] / count
    if rows.reveal_steps is None:
        return _mask(rows, fraction, to_device(torch.rand(rows.masked.shape), rows.masked.device))
    step = rows.reveal_steps.clamp(min=1)
    return _mask(rows, fraction, 1 - (step - 0.5) / step.amax(-1, keepdim=True))


def _mask(rows: RolloutRows, probability: Tensor, draw: Tensor) -> RolloutRows:
    """Masks learned positions whose uniform draw, (B, L), is below the probability; at least one of each row."""
    masked = rows.learned & (draw < probability)
    # A row without a mask would teach nothing: mask the position that came closest.
    closest = (draw - probability).masked_fill(~rows.learned, torch.inf).argmin(-1, keepdim=True)
    lucky = torch.zeros_like(masked).scatter(-1, closest, ~masked.any(-1, keepdim=True)) & rows.learned
    return replace(rows, masked=masked | lucky)
