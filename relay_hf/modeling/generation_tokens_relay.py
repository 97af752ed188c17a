"""The token that a scored position gets, and how sure the model is; drawn tokens depend on their own row alone.

Legend: N scored positions of all rows, W columns of the grid, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from .head_relay import best_token

# The finaliser of SplitMix64 (Steele, Lea and Flood 2014), as signed numbers.
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class Choice(NamedTuple):
    """A token for each of N positions.

    Args:
        tokens: (N,) ids, never that of [MASK].
        confidence: (N,) fp32 probability of that token.
        measure: (N,) fp32, the number that the unmasking policy compares.
    """

    tokens: Tensor
    confidence: Tensor
    measure: Tensor


@dataclass
class TokenChooser:
    """Picks a token for every scored position, and measures how sure the model is of it.

    Args:
        processors: standard logits processors and warpers whose effect does not depend on the order of tokens.
        do_sample: draw from the distribution instead of taking its mode.
        mask_token_id: id of [MASK], which is never chosen.
        measures: what the policy reads, `"confidence"`, `"entropy"` or `"margin"`.
    """

    processors: LogitsProcessorList
    do_sample: bool
    mask_token_id: int
    measures: str

    @property
    def needs_logits(self) -> bool:
        """Whether the best token and its probability are not enough to choose."""
        return self.do_sample or self.measures != "confidence" or len(self.processors) > 0

    def best(self, model: Any, head_inputs: Tensor) -> Choice:
        """Chooses the most probable tokens, given (N, D) inputs of the head; if they are enough to choose."""
        confidence, tokens = model.best_tokens(head_inputs)
        return Choice(other_than_mask(tokens, self.mask_token_id), confidence, confidence)

    def __call__(self, logits: Tensor, context: Tensor, share_left: Tensor, numbers: Tensor) -> Choice:
        """Chooses from logits.

        Args:
            logits: (N, V), overwritten.
            context: (N, W) tokens of the row that each position belongs to.
            share_left: (N, 1) share of the position's block that is still masked, the `cur_step` of processors that
                follow a schedule.
            numbers: (N,) uniform random numbers in [0, 1) to draw with.
        """
        if self.do_sample:
            # Before the warpers, which could keep [MASK] only.
            logits[:, self.mask_token_id] = -torch.inf
        scores: Tensor = self.processors(context, logits, cur_step=share_left)  # type: ignore[arg-type]
        measure = self._measure(scores)
        confidence, tokens = self._draw(scores, numbers) if self.do_sample else best_token(scores, self.mask_token_id)
        tokens = other_than_mask(tokens, self.mask_token_id)
        return Choice(tokens, confidence, confidence if measure is None else measure)

    def _draw(self, scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Draws with (N,) random numbers: (N,) fp32 probabilities and (N,) tokens."""
        # Once more after the warpers, because a custom one may bring [MASK] back.
        scores[:, self.mask_token_id] = -torch.inf
        # Double precision: the sum over a vocabulary must not lose the rare tokens.
        probabilities = scores.double().softmax(-1)
        cumulative = probabilities.cumsum(-1)
        tokens = torch.searchsorted(cumulative, (numbers * cumulative[:, -1])[:, None], right=True)
        tokens = tokens.clamp(max=scores.shape[-1] - 1)  # where no score is a number
        return probabilities.gather(-1, tokens).float()[:, 0], tokens[:, 0]

    def _measure(self, scores: Tensor) -> Tensor | None:
        """(N,) entropies or margins of the distributions, whatever is drawn; None = the policy reads neither."""
        if self.measures == "entropy":
            return torch.special.entr(scores.float().softmax(-1)).sum(-1)
        return margins(scores, self.mask_token_id) if self.measures == "margin" else None


def other_than_mask(tokens: Tensor, mask_token_id: int) -> Tensor:
    """(N,) tokens with another one in place of [MASK], which is best only if all scores are -inf or NaN.

    With a [MASK] in place, decoding would not end.
    """
    return tokens.where(tokens != mask_token_id, 1 if mask_token_id == 0 else 0)


def margins(scores: Tensor, mask_token_id: int) -> Tensor:
    """How much more probable the best token that is not [MASK] is than any other.

    Args:
        scores: (N, V) logits.
        mask_token_id: id of [MASK], which may be the other token, but not the best one.

    Returns:
        (N,) fp32.
    """
    probabilities = scores.float().softmax(-1)
    mask = probabilities[:, mask_token_id].clone()
    probabilities[:, mask_token_id] = -1.0
    best, second = probabilities.topk(2, dim=-1).values.unbind(-1)
    return best - torch.maximum(second, mask)


def uniform_numbers(*keys: Any) -> Tensor:
    """Uniform random numbers in [0, 1), each a function of its keys alone: the same in any batch, on any device.

    Counter-based, as in Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"): a generator per row would
    have to draw in a loop over rows, and to wait for the device to know which rows draw.

    Args:
        keys: integer tensors that broadcast against each other.

    Returns:
        fp64 tensor of multiples of 2**-48.
    """
    state = torch.zeros((), dtype=torch.long, device=keys[0].device)
    for key in keys:
        # The increment of SplitMix64, so that a key of zero changes the state as well.
        state = _mix(state + key + (0x9E3779B97F4A7C15 - 2**64))
    return _shifted(state, 16).double() * 2.0**-48


def _mix(state: Tensor) -> Tensor:
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        state = (state ^ _shifted(state, shift)) * multiplier
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Shifts to the right and fills with zeros: 64-bit integers are signed in torch."""
    return (state >> bits) & (2 ** (64 - bits) - 1)
