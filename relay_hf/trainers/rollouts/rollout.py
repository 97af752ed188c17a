"""Denoising steps on training text, differentiated in windows. `denoiser.py` computes a single step.

Legend: B rows, L positions, S positions of a block, K steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...modeling.unmasking_relay import UnmaskingPolicy, in_earliest_sub_block, sub_blocks_of
from .denoiser import Denoiser
from .rows import RolloutRows

NOISE_BINS = 4
Carry = Literal["gradient", "state", "prediction", "nothing"]
# Changes the masks after a step, given the rows and the (B, L) probability of the best token at masked positions.
Advance = Callable[[RolloutRows, Tensor], RolloutRows]


@dataclass(frozen=True)
class Reveal:
    """Reveals the true token where decoding would reveal its own token (teacher forcing).

    Args:
        policy: the reveal rule; it decides for each block separately.
        block_size: block size of the model; None = a row is one block.
        sub_block_size: only the first sub-block of this size that holds a mask takes part, as in decoding (the
            published code calls this "decode_aligned"); None = the whole block takes part.
    """

    policy: UnmaskingPolicy
    block_size: int | None
    sub_block_size: int | None = None

    @torch.no_grad()
    def __call__(self, rows: RolloutRows, confidence: Tensor) -> RolloutRows:
        count, length = rows.masked.shape
        masked = by_block(rows.masked, self.block_size)
        if self.sub_block_size is not None:
            anchor = self._anchor(rows, len(masked))
            masked = masked & in_earliest_sub_block(masked, sub_blocks_of(masked.shape[1], self.sub_block_size, anchor))
        reveal = self.policy(by_block(confidence, self.block_size), masked)
        return replace(rows, masked=rows.masked & ~reveal.view(count, -1)[:, :length])

    def _anchor(self, rows: RolloutRows, groups: int) -> Tensor:
        """(groups,) where sub-blocks begin: with the block; on a canvas with what is learned, as in decoding."""
        if self.block_size is None:
            return rows.learned.long().argmax(-1)
        return torch.zeros(groups, dtype=torch.long, device=rows.masked.device)


@dataclass(frozen=True)
class FollowTrace:
    """Reveals what the trace of a row reveals in its next steps, in every block by itself.

    Args:
        stride: how many steps of the trace are one step here.
        block_size: block size of the model; None = a row is one block.
    """

    stride: int
    block_size: int | None

    def upcoming(self, rows: RolloutRows) -> Tensor:
        """(B, L) bool, the masked positions that the next steps of the trace reveal; some of every block with masks."""
        count, length = rows.masked.shape
        masked, step = by_block(rows.masked, self.block_size), by_block(rows.reveal_steps, self.block_size)
        first = step.where(masked, step.amax(-1, keepdim=True)).amin(-1, keepdim=True)
        # What was known before the first step is learned in it.
        return (masked & (step < first.clamp(min=1) + self.stride)).view(count, -1)[:, :length]

    def __call__(self, rows: RolloutRows, confidence: Tensor) -> RolloutRows:
        return replace(rows, masked=rows.masked & ~self.upcoming(rows))


def complement(rows: RolloutRows, confidence: Tensor) -> RolloutRows:
    """Masks exactly the learned positions that were visible; reveals the rest."""
    return replace(rows, masked=rows.learned & ~rows.masked)


def stay(rows: RolloutRows, confidence: Tensor) -> RolloutRows:
    """Changes nothing; used after the last step."""
    return rows


def loss_by_noise(losses: Tensor, rows: RolloutRows, block_size: int | None) -> Tensor:
    """Sums the losses of positions at comparable noise, without waiting for the device.

    Args:
        losses: (B, L) losses of the masked positions, 0 at all others.
        rows: the rows before the step that computed the losses.
        block_size: block size of the model; None = a row is one block.

    Returns:
        (2, 4): sum of losses and number of positions, by the fraction of the learned positions of a block that is
        masked: up to 25 %, 50 %, 75 % or all.
    """
    masked, learned = (by_block(flags, block_size).sum(-1) for flags in (rows.masked, rows.learned))  # (blocks,)
    quarter = ((NOISE_BINS * masked - 1) // learned.clamp(min=1)).clamp(min=0)
    sums = torch.stack([by_block(losses.float(), block_size).sum(-1), masked.float()])
    return sums.new_zeros(2, NOISE_BINS).index_add(1, quarter, sums)


def by_block(tensor: Tensor, block_size: int | None) -> Tensor:
    """(B, L) -> (blocks, S); zeros fill up the last block of each row; None = a row is one block."""
    width = block_size or tensor.shape[1]
    return F.pad(tensor, (0, -tensor.shape[1] % width)).view(-1, width)


class Rollout:
    """K >= 1 steps of denoising, and the loss of each (Algorithm 1 of arXiv 2605.22967).

    The loss of a window of steps must be differentiated before the next window runs: then no more than one window of
    activations is alive, and gradients never cross the border between two (truncated backpropagation through time).

        while rollout.windows_left:
            rollout.run_window().backward()

    Args:
        denoiser: computes the steps of these rows.
        rows: the rows before the first step.
        advances: K changes of the rows, one after each step.
        carry: `"gradient"` lets gradients flow through the state, `"state"` cuts them between steps, `"prediction"`
            gives each step the state that a first pass over the same rows makes, `"nothing"` carries no state.
        reduce_loss: the scalar loss of a step, from its (B, L) losses and the rows before it.
        window: steps per window; None = K. The last window may be shorter.
        averages: the loss is the mean of the K steps instead of their sum.
        reference: the denoiser of the model that makes the first pass of `"prediction"`; None = `denoiser` itself.

    Attributes:
        rows: the rows as the last step left them, with a detached state.
        step_losses: detached scalar loss of each step so far.
        step_masked: for each step so far, the (B, L) bool positions that were masked.
        loss_by_noise: (2, 4), the sum of the results of `loss_by_noise` over all steps so far.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        rows: RolloutRows,
        advances: Sequence[Advance],
        carry: Carry,
        reduce_loss: Callable[[Tensor, RolloutRows], Tensor],
        window: int | None = None,
        averages: bool = False,
        reference: Denoiser | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.reference = reference
        self.rows = rows
        self.advances = advances
        self.carry = carry
        self.reduce_loss = reduce_loss
        self.window = window or len(advances)
        self.averages = averages
        self.step_losses: list[Tensor] = []
        self.step_masked: list[Tensor] = []
        self.loss_by_noise = torch.zeros(2, NOISE_BINS, device=rows.masked.device)

    @property
    def windows_left(self) -> int:
        """Number of windows that have not run yet."""
        return -(-(len(self.advances) - len(self.step_losses)) // self.window)

    def run_window(self) -> Tensor:
        """Runs the steps of the next window; returns their part of the loss, with its graph."""
        done = len(self.step_losses)
        self.denoiser.begin_window(is_last=self.windows_left == 1)
        state = None if self.carry == "nothing" else self.rows.relay_state
        goes_on = self.carry in ("gradient", "state")
        losses = []
        for advance in self.advances[done : done + self.window]:
            if self.carry == "prediction":
                state = self._predicted_state()
                self.rows = replace(self.rows, has_state=torch.ones_like(self.rows.has_state))
            masked = self.rows.masked
            of_positions, confidence, next_state = self.denoiser.step(self.rows, state, leaves_state=goes_on)
            losses.append(self.reduce_loss(of_positions, self.rows))
            self.loss_by_noise += loss_by_noise(of_positions.detach(), self.rows, self.denoiser.config.block_size)
            self.rows = advance(self.rows, confidence)
            if goes_on:
                state = next_state.detach() if self.carry == "state" else next_state
                self.rows = replace(self.rows, has_state=torch.ones_like(self.rows.has_state))
            self.step_losses.append(losses[-1].detach())
            self.step_masked.append(masked)
        if goes_on:
            self.rows = replace(self.rows, relay_state=state.detach().float())
        total = torch.stack(losses).sum()
        return total / len(self.advances) if self.averages else total

    @torch.no_grad()
    def _predicted_state(self) -> Tensor:
        if self.reference is None:
            return self.denoiser.predicted_state(self.rows)
        self.reference.begin_window(is_last=True)  # the reference is not differentiated
        return self.reference.predicted_state(self.rows)
