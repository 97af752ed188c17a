"""What each objective denoises, what it needs of a channel, and how the losses of a step become one number.

A `Recipe` says everything about an objective. Other packages add theirs with `register_objective`.

Legend: B rows, L positions, K steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..hub_cards import FAST_DLLM_V2_CITATION
from ..modeling import RelayConfig, make_policy
from ..modeling.channel_relay import CHANNELS, Channel, NoChannel
from ..modeling.registry_relay import Registry
from ..modeling.unmasking_relay import POLICIES
from .rollouts.noise import mask_uniformly
from .rollouts.rollout import Advance, Carry, FollowTrace, Reveal, by_block, complement, stay
from .rollouts.rows import RolloutRows

if TYPE_CHECKING:
    from .relay_config import RelayTrainerConfig

# The positions of rows that a mean is taken over, (B, L) bool.
MASKED, LEARNED = attrgetter("masked"), attrgetter("learned")


Advances = Callable[["RelayTrainerConfig", RelayConfig, bool], list[Advance]]
Start = Callable[..., RolloutRows]  # called like `mask_uniformly`


def _carries(channel: type[Channel]) -> bool:
    return not issubclass(channel, NoChannel)


# What an objective needs of a channel: completes "a channel that ...", and whether a class has it.
NEEDS: dict[Carry, tuple[str, Callable[[type[Channel]], bool]]] = {
    "gradient": ("can be differentiated", lambda channel: _carries(channel) and not channel.reads_distribution),
    "state": ("carries a state", _carries),
    "prediction": ("reads predictions", lambda channel: channel.reads_distribution),
    "nothing": ("may be any", lambda channel: True),
}


@dataclass(frozen=True)
class Recipe:
    """Description of an objective.

    Args:
        sentence: how a card describes it, without a full stop.
        advances: function of the training arguments, the model's configuration and whether random numbers may be drawn
            (False in evaluation); returns K changes of the rows, one after each of the K steps.
        carry: what one step passes to the next, see `Rollout`. It decides what the objective needs of a channel.
        start: masks fresh rows before the first step; None = every learned position is masked at first, and rows stay
            in the rollout buffer until all of them are revealed.
        counted: function of the rows; returns the (B, L) bool positions by whose number the sum of a step's losses is
            divided.
        citation: BibTeX of the objective's source, for cards.
        follows_traces: rows need `reveal_steps`, which say when a trace revealed each position.
        takes_any_channel: where a channel cannot be differentiated, its state is carried; where it has none, nothing.
    """

    sentence: str
    advances: Advances
    carry: Carry = "nothing"
    start: Start | None = None
    counted: Callable[[RolloutRows], Tensor] = MASKED
    citation: str = ""
    follows_traces: bool = False
    takes_any_channel: bool = False

    @property
    def uses_buffer(self) -> bool:
        """Whether rows stay in the rollout buffer between optimizer steps."""
        return self.start is None

    @property
    def uses_channel(self) -> bool:
        """Whether the relay channel is trained."""
        return self.carry != "nothing"

    @property
    def keeps_state(self) -> bool:
        """Whether rows keep the state that a step has left."""
        return self.carry in ("gradient", "state")

    def for_channel(self, channel: str) -> "Recipe":
        """The recipe as it trains a model with this `relay_channel`: one that takes any carries the most it can."""
        carries: tuple[Carry, ...] = ("gradient", "state", "nothing") if self.takes_any_channel else (self.carry,)
        possible = [carry for carry in carries if NEEDS[carry][1](CHANNELS[channel])]
        return replace(self, carry=(possible or carries)[0])

    def fits(self, channel: str) -> bool:
        """Whether the `relay_channel` of a model can serve the objective."""
        return NEEDS[self.for_channel(channel).carry][1](CHANNELS[channel])

    def check_channel(self, name: str, channel: str) -> None:
        """Raise a ValueError if the `relay_channel` of a model cannot serve the objective, whose name is `name`."""
        if not self.fits(channel):
            channels = sorted(other for other in CHANNELS if self.fits(other))
            objectives = [other for other, recipe in RECIPES.items() if recipe.fits(channel)]
            raise ValueError(
                f"`objective={name!r}` needs a channel that {NEEDS[self.carry][0]}, but the model has "
                f"`relay_channel={channel!r}`: load it with one of the channels {channels}, or choose one of the "
                f"objectives {objectives}."
            )


def reveals(args: "RelayTrainerConfig", config: RelayConfig, is_random: bool) -> list[Advance]:
    """`args.rollout_steps` reveals by the unmasking policy; with jitter, each reveal draws its own threshold."""
    thresholds = [args.unmasking_threshold] * args.rollout_steps
    bounds = POLICIES.find(args.unmasking_policy).bounds
    if is_random and args.threshold_jitter and bounds is not None:
        noise = torch.randn(args.rollout_steps) * args.threshold_jitter
        thresholds = [bounds.clamp(args.unmasking_threshold + float(n)) for n in noise]
    name, count = args.unmasking_policy, args.unmasking_count
    policies = [make_policy(name, threshold, unmasking_count=count) for threshold in thresholds]
    return [Reveal(policy, config.block_size, args.sub_block_size) for policy in policies]


def trace_steps(args: "RelayTrainerConfig", config: RelayConfig, is_random: bool) -> list[Advance]:
    """`args.rollout_steps` reveals of what the rows' own traces reveal in their next `args.trace_stride` steps."""
    return [FollowTrace(args.trace_stride, config.block_size)] * args.rollout_steps


def one_step(args: "RelayTrainerConfig", config: RelayConfig, is_random: bool) -> list[Advance]:
    """A single step, after which nothing changes."""
    return [stay]


def mask_and_complement(args: "RelayTrainerConfig", config: RelayConfig, is_random: bool) -> list[Advance]:
    """Two steps; the second step masks the positions that are visible in the first."""
    return [complement, stay]


class Recipes(Registry[Recipe]):
    """Objective -> recipe. Its sentence shows whether a recipe is the same one, defined again."""

    def problem(self, member: Any) -> str:
        return "" if isinstance(member, Recipe) else "give a `Recipe`"

    def identity(self, member: Recipe) -> str:
        return f"({member.sentence})"


RECIPES = Recipes("objective", Recipe, "relay_hf.register_objective")
RECIPES |= {
    "relay": Recipe(
        "the state is carried between denoising steps, with back-propagation through them", reveals, carry="gradient"
    ),
    "relay_sg": Recipe(
        "the state is carried between denoising steps, without gradients between them", reveals, carry="state"
    ),
    "rollout": Recipe("several denoising steps, nothing carried between them but the tokens", reveals),
    "traces": Recipe(
        "several denoising steps along traces of decoding, the state carried as far as the channel allows",
        trace_steps, carry="gradient", follows_traces=True, takes_any_channel=True,
    ),
    "masked": Recipe(
        "plain masked diffusion from a uniformly drawn fraction of masks", one_step, start=mask_uniformly
    ),
    "residual_context": Recipe(
        "masked diffusion in which each mask carries what a first pass over the same text predicts there",
        one_step, carry="prediction", start=mask_uniformly,
    ),
    "complementary": Recipe(
        "plain masked diffusion from a uniformly drawn fraction of masks and from its complement",
        # A mask and its complement are two halves of one mean.
        mask_and_complement, start=mask_uniformly, counted=LEARNED, citation=FAST_DLLM_V2_CITATION,
    ),
}  # fmt: skip


def register_objective(name: str, recipe: Recipe) -> None:
    """Adds an objective, which `RelayTrainerConfig(objective=name)` then selects.

    An objective that is registered again with the same sentence, as in a notebook's cell that runs twice, replaces the
    former.

    Args:
        name: value of `objective`.
        recipe: description of the objective.

    Raises:
        ValueError: `name` is no text, or taken by another objective; or `recipe` is no `Recipe`.
    """
    RECIPES.add(name, recipe)


def draw_masks(args: "RelayTrainerConfig", config: RelayConfig, rows: RolloutRows, is_random: bool) -> RolloutRows:
    """Fresh rows with the masks that their objective starts from.

    Args:
        args: the training arguments; `args.recipe.start` draws.
        config: the model's configuration.
        rows: fresh rows.
        is_random: draw from torch's global source; False = the same masks for a row each time, whatever its place.
    """
    generators = None
    if not is_random:
        seeds = (args.seed + (rows.clean_ids * rows.attention_mask).sum(-1)).tolist()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return args.recipe.start(rows, config, generators, args.process_index, args.world_size)


def mean_of_positions(recipe: Recipe, share: Callable[[Tensor], Tensor]) -> Callable[[Tensor, RolloutRows], Tensor]:
    """The mean of training: a step's losses over the positions counted in the whole micro-batch.

    Args:
        recipe: recipe of the objective.
        share: turns the count of this process into the mean over processes, so that the mean of the processes' losses
            is the mean over all rows.
    """

    def reduce_loss(losses: Tensor, rows: RolloutRows) -> Tensor:
        count = share(recipe.counted(rows).sum().float())
        return losses.sum() / count.where(count > 0, 1.0)

    return reduce_loss


def capped_mean(
    cap: float, block_size: int | None, share: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, RolloutRows], Tensor]:
    """The mean of PUMBA: each masked position weighs min(1/t, cap), t the masked fraction of its block or canvas.

    The weighted losses are divided by the number of learned positions in blocks that still hold a mask. Without a cap,
    every such block would count by its number of learned positions, however many of them are masked; the cap lets
    blocks that are nearly revealed count less (arXiv 2609.37974, cap 5).

    Args:
        cap: the largest weight.
        block_size: block size of the model; None = a row is one block.
        share: as in `mean_of_positions`.
    """

    def reduce_loss(losses: Tensor, rows: RolloutRows) -> Tensor:
        masked, learned = (by_block(flags, block_size).sum(-1).float() for flags in (rows.masked, rows.learned))
        weight = (learned / masked.clamp(min=1)).clamp(max=cap)
        count = share((learned * (masked > 0)).sum())
        return (by_block(losses, block_size).sum(-1) * weight).sum() / count.where(count > 0, 1.0)

    return reduce_loss


def mean_of_rows(recipe: Recipe) -> Callable[[Tensor, RolloutRows], Tensor]:
    """The mean of evaluation: every row has the same weight, so that the batch size does not change the result."""

    def reduce_loss(losses: Tensor, rows: RolloutRows) -> Tensor:
        return (losses.sum(-1) / recipe.counted(rows).sum(-1).clamp(min=1)).mean()

    return reduce_loss
