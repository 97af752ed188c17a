"""Two objectives of another package; importing this module makes them known."""

from dataclasses import replace

import torch
from torch import Tensor

from relay_hf import RelayConfig, register_objective
from relay_hf.trainers import Recipe, RelayTrainerConfig, RolloutRows
from relay_hf.trainers.rollouts.rollout import Advance, stay


def mask_every_other(rows: RolloutRows, config: RelayConfig, *_: object) -> RolloutRows:
    """Fresh rows with the learned positions of even columns masked."""
    is_even = torch.arange(rows.clean_ids.shape[1], device=rows.clean_ids.device) % 2 == 0
    return replace(rows, masked=rows.learned & is_even)


def two_looks(args: RelayTrainerConfig, config: RelayConfig, is_random: bool) -> list[Advance]:
    return [stay, stay]


def reveal_first(rows: RolloutRows, confidence: Tensor) -> RolloutRows:
    """Reveals the first masked position of each row."""
    return replace(rows, masked=rows.masked & (rows.masked.cumsum(-1) > 1))


def left_to_right(args: RelayTrainerConfig, config: RelayConfig, is_random: bool) -> list[Advance]:
    return [reveal_first] * args.rollout_steps


register_objective(
    "two_looks",
    Recipe(
        "two looks at the same masks, the second with the state that the first leaves",
        two_looks,
        carry="gradient",
        start=mask_every_other,
        citation="@misc{somebody2026looks,\n  title = {Two Looks}\n}",
    ),
)
register_objective(
    "left_to_right",
    Recipe("each step reveals one position, from left to right, and carries the state", left_to_right, carry="state"),
)
