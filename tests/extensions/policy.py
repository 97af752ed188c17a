"""An unmasking policy in one file, as another package writes it."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from relay_hf import register_policy
from relay_hf.modeling import Bounds, UnmaskingPolicy


@dataclass(frozen=True)
class LeadingRun(UnmaskingPolicy):
    """Reveals from the left as long as positions are probable enough, and the leftmost one in any case.

    Args:
        threshold: in [0.1, 0.9], the probability that is enough.
    """

    threshold: float = 0.5
    bounds: ClassVar[Bounds] = Bounds(0.1, 0.9, shown=0.9, outside="is not in [0.1, 0.9], as `leading_run` needs")
    citation: ClassVar[str] = "@misc{somebody2026leading,\n  title = {Leading Runs},\n  eprint = {2611.00002}\n}"

    def __call__(self, measure: Tensor, masked: Tensor, progress: object = None) -> Tensor:
        stops = (masked & (measure < self.threshold)).cumsum(-1)
        return masked & ((stops == 0) | (masked.cumsum(-1) == 1))


register_policy("leading_run", LeadingRun)
