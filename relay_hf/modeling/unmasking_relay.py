"""Unmasking policies: which masked positions to reveal, given how sure the model is. Shared by decoding and training.

A policy describes itself; `register_policy` adds one from any package.

Legend: G groups (a row, a block or a sub-block, whatever is denoised as a unit), L positions of a group.
"""

import inspect
import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .registry_relay import Registry

# What `unmasking_order` may say. The last one reads nothing.
ORDERS = ("confidence", "entropy", "margin", "left_to_right")
# Dream's schedule ends just above 0.
END_OF_TIME = 1e-3


class Progress(NamedTuple):
    """How far each group is, for policies that spread a number of steps.

    Args:
        step: (G,) long, steps that the group has had.
        positions: (G,) long, how many positions the steps are for.
    """

    step: Tensor
    positions: Tensor


class Bounds(NamedTuple):
    """What `unmasking_threshold` may be.

    Args:
        least, most: the ends of the range, which belong to it.
        shown: the end of a slider, where `most` is infinite or far away.
        is_whole: only whole numbers.
        outside: what an error says of a number that is not in the range; the number itself comes before it.
    """

    least: float = 0.0
    most: float = 1.0
    shown: float = 1.0
    is_whole: bool = False
    outside: str = "is out of the range of the policy: choose another number"

    def check(self, threshold: float) -> None:
        """Raise a ValueError if the threshold is not in the range."""
        if not self.least <= threshold <= self.most or (self.is_whole and not float(threshold).is_integer()):
            raise ValueError(f"`unmasking_threshold={threshold}` {self.outside}.")

    def clamp(self, threshold: float) -> float:
        """The nearest number of the range."""
        return min(max(threshold, self.least), self.most)


@dataclass(frozen=True)
class UnmaskingPolicy:
    """Chooses positions to reveal; each group with a masked position gets at least one (only `TimeSchedule` may leave
    out steps, and comes to an end all the same). A higher threshold is either never slower or never faster.

    A subclass is a frozen dataclass whose fields are the options that it takes, of `threshold`, `denoising_steps` and
    `unmasking_order`. The first lines of its docstring say what it does.

    Attributes:
        bounds: what its `threshold` may be; None = it has none.
        needs_steps: it cannot do without `denoising_steps`.
        citation: BibTeX of its source, for cards.
    """

    bounds: ClassVar[Bounds | None] = None
    needs_steps: ClassVar[bool] = False
    citation: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.bounds is not None:
            self.bounds.check(self.threshold)  # type: ignore[attr-defined]  # a field of those that have bounds

    @property
    def reads(self) -> str:
        """What is looked at: `"confidence"`, the probability of each position's token; `"entropy"` of each position's
        distribution, in nats; `"margin"`, how much more probable the best token is than any other."""
        return "confidence"

    @classmethod
    def options(cls) -> set[str]:
        """Names of the options that it takes."""
        return {field.name for field in fields(cls)}

    @classmethod
    def sentence(cls) -> str:
        """What it does."""
        return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())

    def __call__(self, measure: Tensor, masked: Tensor, progress: Progress | None = None) -> Tensor:
        """(G, L) of what it reads, (G, L) bool -> (G, L) bool, a subset of `masked`.

        `progress` is needed with `denoising_steps`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ConfidenceThreshold(UnmaskingPolicy):
    """Reveals every position whose probability is above the threshold, and the most probable one in any case.

    Source: Fast-dLLM v2 (arXiv 2509.26328), the rule of the published language-model relay. With `denoising_steps`:
    SDAR's dynamic strategy (arXiv 2510.06303).

    Args:
        threshold: in [0, 1]. Higher is slower and safer; 1 reveals one position at a time.
        denoising_steps: a group takes no more; so many positions as that needs are revealed in any case.
    """

    threshold: float = 0.85
    denoising_steps: int | None = None
    bounds: ClassVar[Bounds] = Bounds(outside="is not a probability: `confidence_threshold` needs [0, 1]")

    def __call__(self, measure: Tensor, masked: Tensor, progress: Progress | None = None) -> Tensor:
        sure = masked & (measure > self.threshold)
        if self.denoising_steps is None:
            return sure | _most_confident(measure, masked)
        return sure | _first(measure, masked, _even_share(self.denoising_steps, progress))


@dataclass(frozen=True)
class ConfidenceBudget(UnmaskingPolicy):
    """Reveals the surest positions as long as their uncertainties 1 - p sum to less than the threshold; at least one.

    Source: the published Sudoku relay (arXiv 2605.22967).

    Args:
        threshold: total uncertainty spent per step, >= 0. Lower is slower and safer; 0 reveals one position at a time.
    """

    threshold: float = 0.15
    bounds: ClassVar[Bounds] = Bounds(
        most=math.inf, outside="is negative: `confidence_budget` needs an uncertainty >= 0"
    )

    def __call__(self, measure: Tensor, masked: Tensor, progress: Progress | None = None) -> Tensor:
        # Known positions sort last and cost infinitely much.
        uncertainty = (1.0 - measure.float()).masked_fill(~masked, torch.inf)
        ascending, order = uncertainty.sort(dim=-1, stable=True)
        within_budget = ascending.cumsum(-1) < self.threshold
        return torch.zeros_like(masked).scatter(-1, order, within_budget) | _most_confident(measure, masked)


@dataclass(frozen=True)
class FixedCount(UnmaskingPolicy):
    """Reveals a number of positions that is known beforehand, the first of an order.

    Source: LLaDA's low-confidence remasking (arXiv 2502.09992); SDAR's static and sequential strategies.

    Args:
        threshold: positions per step, a whole number >= 1; not read with `denoising_steps`.
        denoising_steps: steps that the positions of a group are spread over evenly, the first ones taking one more.
        unmasking_order: which positions are first.
    """

    threshold: float = 1
    denoising_steps: int | None = None
    unmasking_order: str = "confidence"

    bounds: ClassVar[Bounds] = Bounds(
        1,
        math.inf,
        shown=32,
        is_whole=True,
        outside="is not a number of positions: `fixed_count` needs a whole number >= 1, or `denoising_steps`",
    )

    def __post_init__(self) -> None:
        if self.denoising_steps is None:
            super().__post_init__()

    @property
    def reads(self) -> str:
        return _read_for(self.unmasking_order)

    def __call__(self, measure: Tensor, masked: Tensor, progress: Progress | None = None) -> Tensor:
        steps = self.denoising_steps
        count = self.threshold if steps is None else _even_share(steps, progress)
        return _first(_precedence(self.unmasking_order, measure), masked, count)


@dataclass(frozen=True)
class TimeSchedule(UnmaskingPolicy):
    """Reveals the share of the masked positions that the step takes of the time left, the first of an order.

    Time falls linearly from 1 to nearly 0: of m masked positions, a step from t to s reveals int(m (1 - s / t)), which
    may be none, and the last step all.

    Source: Dream (arXiv 2508.15487).

    Args:
        denoising_steps: of a group.
        unmasking_order: which positions are first.
    """

    denoising_steps: int = 1
    unmasking_order: str = "confidence"
    needs_steps: ClassVar[bool] = True

    @property
    def reads(self) -> str:
        return _read_for(self.unmasking_order)

    def __call__(self, measure: Tensor, masked: Tensor, progress: Progress | None = None) -> Tensor:
        steps, left = self.denoising_steps, masked.sum(-1)
        time = torch.linspace(1.0, END_OF_TIME, steps + 1, dtype=torch.float32, device=masked.device)
        share = 1.0 - time[1:] / time[:-1]  # (steps,)
        step = _needed(progress).step
        count = (left * share[step.clamp(max=steps - 1)]).long()
        return _first(_precedence(self.unmasking_order, measure), masked, count.where(step < steps - 1, left))


@dataclass(frozen=True)
class EntropyBound(UnmaskingPolicy):
    """Reveals the surest positions as long as the entropies of those before them sum to at most the threshold.

    The sum bounds what the revealed tokens can tell about each other, so that they may be chosen at once.

    Source: arXiv 2505.24857, the rule of DiffusionGemma.

    Args:
        threshold: nats, >= 0. Lower is slower and safer; 0 reveals one position at a time, and the certain ones.
    """

    threshold: float = 0.1
    bounds: ClassVar[Bounds] = Bounds(most=math.inf, shown=3.0, outside="is negative: `entropy_bound` needs nats, >= 0")

    @property
    def reads(self) -> str:
        return "entropy"

    def __call__(self, measure: Tensor, masked: Tensor, progress: Progress | None = None) -> Tensor:
        # Known positions sort last; those whose entropy is no number just before them, so that they end as well.
        entropy = measure.float().nan_to_num(nan=torch.finfo(torch.float32).max)
        ascending, order = entropy.masked_fill(~masked, torch.inf).sort(dim=-1, stable=True)
        before = F.pad(ascending.cumsum(-1)[..., :-1], (1, 0))
        return torch.zeros_like(masked).scatter(-1, order, before <= self.threshold) & masked


POLICIES: Registry[type[UnmaskingPolicy]] = Registry("unmasking_policy", UnmaskingPolicy, "relay_hf.register_policy")


def register_policy(name: str, cls: type[UnmaskingPolicy]) -> None:
    """Makes a policy known, so that `unmasking_policy=name` means it, in decoding and in training.

    Args:
        name: as `unmasking_policy` is to have it.
        cls: subclass of `UnmaskingPolicy`.

    Raises:
        ValueError: the name is taken, `cls` is no policy, or it has bounds and no field `threshold`.
    """
    if getattr(cls, "bounds", None) is not None and "threshold" not in getattr(cls, "__dataclass_fields__", {}):
        raise ValueError(
            f"`register_policy({name!r}, ...)` was given {cls!r}, which has bounds but no field `threshold`: add one, "
            "and decorate the class with `@dataclass(frozen=True)`."
        )
    POLICIES.add(name, cls)


register_policy("confidence_threshold", ConfidenceThreshold)
register_policy("confidence_budget", ConfidenceBudget)
register_policy("fixed_count", FixedCount)
register_policy("time_schedule", TimeSchedule)
register_policy("entropy_bound", EntropyBound)


def make_policy(
    name: str, threshold: float, denoising_steps: int | None = None, unmasking_order: str = "confidence"
) -> UnmaskingPolicy:
    """Builds the policy called `name`.

    Args:
        name: one that is registered.
        threshold: what it compares with; a policy without one does not read it.
        denoising_steps: how many steps a group takes, for policies that spread them; None = as many as it needs.
        unmasking_order: which positions are revealed first, for policies that reveal a number of them.

    Raises:
        ValueError: unknown name, an option that is of a wrong type or out of range, or one that the policy lacks.
    """
    if not isinstance(threshold, int | float) or isinstance(threshold, bool):
        raise ValueError(f"`unmasking_threshold={threshold!r}` is not a number: give one in the range of the policy.")
    policy = POLICIES.find(name)
    if not isinstance(unmasking_order, str) or unmasking_order not in ORDERS:
        raise ValueError(f"`unmasking_order={unmasking_order!r}` is unknown: choose one of {sorted(ORDERS)}.")
    if denoising_steps is not None and not (type(denoising_steps) is int and denoising_steps >= 1):
        raise ValueError(f"`denoising_steps={denoising_steps!r}` is not a whole number >= 1: give one, or `None`.")
    given: dict[str, Any] = {"denoising_steps": denoising_steps, "unmasking_order": unmasking_order}
    for option, default in (("denoising_steps", None), ("unmasking_order", "confidence")):
        if given[option] != default and option not in policy.options():
            others = sorted(other for other, cls in POLICIES.items() if option in cls.options())
            raise ValueError(
                f"`{option}={given[option]!r}` has no effect with `unmasking_policy={name!r}`: leave it out, or choose "
                f"one of {others}."
            )
    if policy.needs_steps and denoising_steps is None:
        raise ValueError(
            f"`unmasking_policy={name!r}` spreads the positions over a number of steps: also set `denoising_steps`."
        )
    given["threshold"] = threshold
    return policy(**{option: value for option, value in given.items() if option in policy.options()})


def sub_blocks_of(count: int, size: int, anchor: Tensor) -> Tensor:
    """Number of the sub-block that each position of a group is in, negative before the anchor: (G, L) long.

    Args:
        count: L, positions of a group.
        size: positions of a sub-block.
        anchor: (G,) position at which sub-block 0 begins; the first one of a group may be shorter, as may the last.
    """
    position = torch.arange(count, device=anchor.device)
    return (position - anchor[:, None]).div(size, rounding_mode="floor")


def in_earliest_sub_block(masked: Tensor, sub_blocks: Tensor) -> Tensor:
    """Positions of the first sub-block that holds a mask: (G, L) bool -> (G, L) bool.

    Args:
        masked: what is still hidden of each group.
        sub_blocks: (G, L), as `sub_blocks_of` says.
    """
    return sub_blocks == sub_blocks.gather(1, masked.long().argmax(-1, keepdim=True))


def _read_for(order: str) -> str:
    return "confidence" if order == "left_to_right" else order


def _precedence(order: str, measure: Tensor) -> Tensor:
    """(G, L) numbers that are higher for positions which come earlier in the order."""
    if order == "left_to_right":
        return -torch.arange(measure.shape[-1], device=measure.device).expand_as(measure).float()
    return -measure if order == "entropy" else measure


def _needed(progress: Progress | None) -> Progress:
    if progress is None:
        raise ValueError("A policy with `denoising_steps` has to be given the `progress` of its groups: pass it.")
    return progress


def _even_share(steps: int, progress: Progress | None) -> Tensor:
    """(G,) positions of this step, if they are spread evenly and the first steps take one more; at least one."""
    step, positions = _needed(progress)
    return (positions // steps + (step < positions % steps)).clamp(min=1)


def _first(measure: Tensor, masked: Tensor, count: Tensor | float) -> Tensor:
    """(G, L) bool with the `count` masked positions of each group whose measure is highest; (G,) or one for all."""
    order = measure.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    counts = count[:, None] if isinstance(count, Tensor) else count
    is_first = torch.arange(masked.shape[-1], device=masked.device) < counts
    return torch.zeros_like(masked).scatter(-1, order, is_first.expand_as(masked)) & masked


def _most_confident(confidence: Tensor, masked: Tensor) -> Tensor:
    """(G, L) bool with the most probable masked position of each group that has one."""
    best = confidence.masked_fill(~masked, -1.0).argmax(-1, keepdim=True)
    return torch.zeros_like(masked).scatter(-1, best, True) & masked
