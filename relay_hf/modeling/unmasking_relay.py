"""Unmasking policies choose the masked positions to reveal, given how sure the model is, in decoding and training.

A policy describes itself; `register_policy` adds one from any package.

Legend: G groups (rows, blocks or sub-blocks: each is denoised as a unit), L positions of a group.
"""

import inspect
import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .registry_relay import Registry

# Values of `unmasking_order`. The last one needs no measure.
ORDERS = ("confidence", "entropy", "margin", "left_to_right")
# Dream's schedule ends just above 0.
END_OF_TIME = 1e-3


class Progress(NamedTuple):
    """The steps of each group so far, for policies that spread positions over a number of steps.

    Args:
        step: (G,) long, steps that each group has had.
        positions: (G,) long, positions that the steps have to reveal in all.
    """

    step: Tensor
    positions: Tensor


class Bounds(NamedTuple):
    """The range of `unmasking_threshold`.

    Attributes:
        least: lower end of the range, included.
        most: upper end of the range, included.
        shown: upper end of a slider, where `most` is infinite or far away.
        is_whole: only whole numbers are in the range.
        outside: rest of the error about a number that is not in the range, after the number.
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
        """The number of the range that is nearest to the threshold."""
        return min(max(threshold, self.least), self.most)


@dataclass(frozen=True)
class UnmaskingPolicy:
    """Chooses the positions to reveal; at least one of each group that has a masked position.

    Only `TimeSchedule` may reveal none in a step, but its schedule ends. A higher threshold is either never slower or
    never faster. A subclass is a frozen dataclass whose fields are the options that the policy takes, out of
    `threshold`, `denoising_steps`, `unmasking_order` and `unmasking_count`. The first lines of its docstring describe
    it on cards.

    Attributes:
        bounds: range of the field `threshold`; None = the policy has no threshold.
        needs_steps: the policy needs `denoising_steps`.
        citation: BibTeX of the policy's source, for cards.
    """

    bounds: ClassVar[Bounds | None] = None
    needs_steps: ClassVar[bool] = False
    citation: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.bounds is not None:
            self.bounds.check(self.threshold)  # type: ignore[attr-defined]  # a field of those that have bounds

    @property
    def reads(self) -> str:
        """The measure that the policy compares: `"confidence"`, the probability of each position's token; `"entropy"`
        of each position's distribution, in nats; `"margin"`, how much more probable the best token is than others."""
        order = getattr(self, "unmasking_order", "confidence")
        return "confidence" if order == "left_to_right" else order

    @classmethod
    def options(cls) -> set[str]:
        """Names of the options that the policy takes."""
        return {field.name for field in fields(cls)}

    @classmethod
    def sentence(cls) -> str:
        """Describes the policy, for cards."""
        return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())

    def __call__(self, measure: Tensor, masked: Tensor, progress: Progress | None = None) -> Tensor:
        """Chooses positions.

        Args:
            measure: (G, L) numbers that `reads` names.
            masked: (G, L) bool, positions to choose from.
            progress: of the groups; needed with `denoising_steps`.

        Returns:
            (G, L) bool, a subset of `masked`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ConfidenceThreshold(UnmaskingPolicy):
    """Reveals every position whose probability is above the threshold, and the most probable one in any case.

    Source: Fast-dLLM v2 (arXiv 2509.26328), the rule of the published language-model relay. With `denoising_steps`:
    SDAR's dynamic strategy (arXiv 2510.06303). With `unmasking_count`: the progressive unmasking of PUMBA
    (arXiv 2609.37974), whose u it is.

    Args:
        threshold: in [0, 1]. Higher is slower and safer; 1 reveals `unmasking_count` positions at a time.
        denoising_steps: steps that a group takes at most; each reveals at least an even share of the positions.
        unmasking_count: how many of the most probable positions are revealed in any case.
    """

    threshold: float = 0.85
    denoising_steps: int | None = None
    unmasking_count: int = 1
    bounds: ClassVar[Bounds] = Bounds(outside="is not a probability: `confidence_threshold` needs [0, 1]")

    def __call__(self, measure: Tensor, masked: Tensor, progress: Progress | None = None) -> Tensor:
        sure = masked & (measure > self.threshold)
        steps = self.denoising_steps
        return sure | _first(measure, masked, self.unmasking_count if steps is None else _even_share(steps, progress))


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
        return torch.zeros_like(masked).scatter(-1, order, within_budget) | _first(measure, masked, 1)


@dataclass(frozen=True)
class FixedCount(UnmaskingPolicy):
    """Reveals a fixed number of positions, the first ones of an order.

    Source: LLaDA's low-confidence remasking (arXiv 2502.09992); SDAR's static and sequential strategies.

    Args:
        threshold: positions per step, a whole number >= 1; not read with `denoising_steps`.
        denoising_steps: steps over which the positions of a group are spread evenly; the first steps take one more.
        unmasking_order: the order, one of `ORDERS`.
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

    def __call__(self, measure: Tensor, masked: Tensor, progress: Progress | None = None) -> Tensor:
        steps = self.denoising_steps
        count = self.threshold if steps is None else _even_share(steps, progress)
        return _first(_precedence(self.unmasking_order, measure), masked, count)


@dataclass(frozen=True)
class TimeSchedule(UnmaskingPolicy):
    """Reveals a share of the masked positions, the step's share of the time left, the first ones of an order.

    Time falls linearly from 1 to nearly 0: of m masked positions, a step from t to s reveals int(m (1 - s / t)), which
    may be none, and the last step all.

    Source: Dream (arXiv 2508.15487).

    Args:
        denoising_steps: steps of a group.
        unmasking_order: the order, one of `ORDERS`.
    """

    denoising_steps: int = 1
    unmasking_order: str = "confidence"
    needs_steps: ClassVar[bool] = True

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

    The sum bounds the information that the revealed tokens share, so that they may be chosen at once.

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
        # Known positions sort last, just behind positions whose entropy is NaN: these must be revealed in the end, too.
        entropy = measure.float().nan_to_num(nan=torch.finfo(torch.float32).max)
        ascending, order = entropy.masked_fill(~masked, torch.inf).sort(dim=-1, stable=True)
        before = F.pad(ascending.cumsum(-1)[..., :-1], (1, 0))
        return torch.zeros_like(masked).scatter(-1, order, before <= self.threshold) & masked


POLICIES: Registry[type[UnmaskingPolicy]] = Registry("unmasking_policy", UnmaskingPolicy, "relay_hf.register_policy")


def register_policy(name: str, cls: type[UnmaskingPolicy]) -> None:
    """Registers a policy under the name that `unmasking_policy` takes, in decoding and in training.

    Args:
        name: the future value of `unmasking_policy`.
        cls: subclass of `UnmaskingPolicy`.

    Raises:
        ValueError: the name is taken, `cls` is no policy, or has bounds but no field `threshold`.
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
    name: str,
    threshold: float,
    denoising_steps: int | None = None,
    unmasking_order: str = "confidence",
    unmasking_count: int = 1,
) -> UnmaskingPolicy:
    """Builds the policy called `name`.

    Args:
        name: name of a registered policy.
        threshold: the policy's threshold; a policy without one does not read it.
        denoising_steps: steps of a group, for policies that spread positions over steps; None = as many as it needs.
        unmasking_order: one of `ORDERS`, for policies that reveal a number of positions.
        unmasking_count: positions that a step reveals in any case.

    Raises:
        ValueError: the name is unknown, or an option has a wrong type, is out of range or not one of the policy's.
    """
    if not isinstance(threshold, int | float) or isinstance(threshold, bool):
        raise ValueError(f"`unmasking_threshold={threshold!r}` is not a number: give one in the range of the policy.")
    policy = POLICIES.find(name)
    if not isinstance(unmasking_order, str) or unmasking_order not in ORDERS:
        raise ValueError(f"`unmasking_order={unmasking_order!r}` is unknown: choose one of {sorted(ORDERS)}.")
    if denoising_steps is not None and not (type(denoising_steps) is int and denoising_steps >= 1):
        raise ValueError(f"`denoising_steps={denoising_steps!r}` is not a whole number >= 1: give one, or `None`.")
    if type(unmasking_count) is not int or unmasking_count < 1:
        raise ValueError(f"`unmasking_count={unmasking_count!r}` is not a whole number >= 1: give one.")
    given: dict[str, Any] = {
        "denoising_steps": denoising_steps,
        "unmasking_order": unmasking_order,
        "unmasking_count": unmasking_count,
    }
    for option, default in zip(given, (None, "confidence", 1), strict=True):
        if given[option] != default and option not in policy.options():
            others = sorted(other for other, cls in POLICIES.items() if option in cls.options())
            raise ValueError(
                f"`{option}={given[option]!r}` has no effect with `unmasking_policy={name!r}`: leave it out, or choose "
                f"one of {others}."
            )
    if unmasking_count > 1 and denoising_steps is not None:
        raise ValueError(
            f"`unmasking_count={unmasking_count}` and `denoising_steps={denoising_steps}` both say how many positions "
            "a step reveals: give one of them."
        )
    if policy.needs_steps and denoising_steps is None:
        raise ValueError(f"`unmasking_policy={name!r}` spreads positions over steps: also set `denoising_steps`.")
    given["threshold"] = threshold
    return policy(**{option: value for option, value in given.items() if option in policy.options()})


def sub_blocks_of(count: int, size: int | Tensor, anchor: Tensor) -> Tensor:
    """Number of the sub-block that each position of a group is in, negative before the anchor: (G, L) long.

    Args:
        count: L, positions of a group.
        size: positions of a sub-block; one number for all groups, or (G,) long.
        anchor: (G,) position at which sub-block 0 begins; a group's first and last sub-block may be shorter.
    """
    position = torch.arange(count, device=anchor.device)
    sizes = size[:, None] if isinstance(size, Tensor) else size
    return (position - anchor[:, None]).div(sizes, rounding_mode="floor")


def in_earliest_sub_block(masked: Tensor, sub_blocks: Tensor) -> Tensor:
    """Positions of the first sub-block that holds a mask: (G, L) bool -> (G, L) bool.

    Args:
        masked: masked positions of each group.
        sub_blocks: (G, L) long, as `sub_blocks_of` returns them.
    """
    return sub_blocks == sub_blocks.gather(1, masked.long().argmax(-1, keepdim=True))


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
    """(G,) positions that this step reveals, at least one, if the first steps of an even spread take one more."""
    step, positions = _needed(progress)
    return (positions // steps + (step < positions % steps)).clamp(min=1)


def _first(measure: Tensor, masked: Tensor, count: Tensor | float) -> Tensor:
    """(G, L) bool, the `count` masked positions of each group whose measure is highest; `count`: (G,) or a number."""
    measure = measure.masked_fill(~masked, -torch.inf)
    nowhere = torch.zeros_like(masked)
    if isinstance(count, int | float) and count == 1:
        return nowhere.scatter(-1, measure.argmax(-1, keepdim=True), True) & masked
    order = measure.argsort(dim=-1, descending=True, stable=True)
    counts = count[:, None] if isinstance(count, Tensor) else count
    is_first = torch.arange(masked.shape[-1], device=masked.device) < counts
    return nowhere.scatter(-1, order, is_first.expand_as(masked)) & masked
