"""What each objective denoises, and how the losses of a step become one number.

Legend: B rows, L positions, N masked positions.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ..modeling import RelayConfig, make_policy
from .noise import mask_uniformly
from .relay_config import Objective, RelayTrainerConfig
from .rollout import Advance, Carry, Reveal, complement, stay
from .rows import RolloutRows

# What a mean is taken over, (B, L) bool of some rows.
MASKED, LEARNED = attrgetter("masked"), attrgetter("learned")


class Recipe(NamedTuple):
    """How an objective is trained.

    Args:
        description: what a card says of it.
        carry: what goes from one step to the next.
        uses_buffer: steps reveal positions one after the other, and rows live on in the buffer; otherwise masks are
            drawn at random.
        counted: (B, L) bool, the positions that a step's sum of losses is divided by.
    """

    description: str
    carry: Carry
    uses_buffer: bool
    counted: Callable[[RolloutRows], Tensor]


RECIPES: dict[Objective, Recipe] = {
    "relay": Recipe(
        "the state is carried between denoising steps, with back-propagation through them",
        carry="gradient", uses_buffer=True, counted=MASKED,
    ),
    "relay_sg": Recipe(
        "the state is carried between denoising steps, without gradients between them",
        carry="state", uses_buffer=True, counted=MASKED,
    ),
    "rollout": Recipe(
        "several denoising steps, nothing carried between them but the tokens",
        carry="nothing", uses_buffer=True, counted=MASKED,
    ),
    "masked": Recipe(
        "plain masked diffusion from a uniformly drawn fraction of masks",
        carry="nothing", uses_buffer=False, counted=MASKED,
    ),
    "residual_context": Recipe(
        "masked diffusion in which each mask carries what a first pass over the same text predicts there",
        carry="prediction", uses_buffer=False, counted=MASKED,
    ),
    # A mask and its complement are two halves of one mean.
    "complementary": Recipe(
        "plain masked diffusion from a uniformly drawn fraction of masks and from its complement",
        carry="nothing", uses_buffer=False, counted=LEARNED,
    ),
}  # fmt: skip


def rollout_advances(args: RelayTrainerConfig, config: RelayConfig, jitter: bool) -> list[Advance]:
    """One reveal per step; with jitter, each has its own threshold, moved back into the valid range."""
    name, threshold = args.unmasking_policy, args.unmasking_threshold
    noise = torch.zeros(args.rollout_steps)
    if jitter and args.threshold_jitter:
        noise = torch.randn(args.rollout_steps) * args.threshold_jitter
    highest = 1.0 if name == "confidence_threshold" else float("inf")
    policies = [make_policy(name, min(max(threshold + float(n), 0.0), highest)) for n in noise]
    return [Reveal(policy, config.block_size, args.sub_block_size) for policy in policies]


def random_masks(
    args: RelayTrainerConfig, config: RelayConfig, rows: RolloutRows, seeded: bool
) -> tuple[RolloutRows, list[Advance]]:
    """Fresh rows with random masks, and what follows them.

    Args:
        args: names the objective.
        config: of the model.
        rows: fresh ones.
        seeded: the same masks for a row each time, wherever it stands.
    """
    generators = None
    if seeded:
        seeds = (args.seed + (rows.clean_ids * rows.attention_mask).sum(-1)).tolist()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    advances: list[Advance] = [complement, stay] if args.objective == "complementary" else [stay]
    return mask_uniformly(rows, config, generators, args.process_index, args.world_size), advances


def mean_of_positions(recipe: Recipe, share: Callable[[Tensor], Tensor]) -> Callable[[Tensor, RolloutRows], Tensor]:
    """The mean of training: a step's losses over the positions counted in the whole micro-batch.

    Args:
        recipe: of the objective.
        share: makes of this process's count the mean of all processes', whose mean loss is then that of all rows.
    """

    def reduce_loss(token_losses: Tensor, rows: RolloutRows) -> Tensor:
        count = share(recipe.counted(rows).sum().float())
        return token_losses.sum() / count.where(count > 0, 1.0)

    return reduce_loss


def mean_of_rows(recipe: Recipe) -> Callable[[Tensor, RolloutRows], Tensor]:
    """The mean of evaluation: every row counts the same, so that batches can be cut in any way."""

    def reduce_loss(token_losses: Tensor, rows: RolloutRows) -> Tensor:
        row = rows.masked.nonzero()[:, 0]  # (N,)
        sums = token_losses.new_zeros(len(rows)).index_add(0, row, token_losses)  # (B,)
        return (sums / recipe.counted(rows).sum(-1).clamp(min=1)).mean()

    return reduce_loss
