"""What one step is about, known before its forward: which positions it scores, and for which requests.

A step holds requests that denoise or commit a block ("drafts" to vLLM, which sorts them to the front), and chunks of
prompts. Nothing here waits for the device.

Legend: n requests of the step, d of them with a block, S positions of a block, N positions that the step scores.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..modeling.generation_candidates_relay import Candidates, Texts, find_candidates
from .internals import async_tensor_h2d
from .rows import Fixed, Moving, Rows


class Batch(NamedTuple):
    """The requests of a step.

    Attributes:
        slots: (n,) long, their rows.
        slots_on_host: (n,) the same numbers on the host.
        drafts: d, requests with a block, the first ones.
        starts: (n,) long, number of each request's first token among those of the step.
        lengths: (n,) on the host, tokens of each request.
        prompts: what the chunks of prompts are about.
    """

    slots: Tensor
    slots_on_host: np.ndarray
    drafts: int
    starts: Tensor
    lengths: np.ndarray
    prompts: "Prompts"

    @classmethod
    def of(cls, batch: Any, size: int, device: torch.device) -> "Batch":
        """Reads vLLM's `InputBatch`."""
        count = batch.num_reqs
        is_draft = np.diff(batch.cu_num_logits_np[: count + 1]) > 0
        drafts = int(is_draft.sum())
        if not is_draft[:drafts].all():
            raise RuntimeError("vLLM has put chunks of prompts before blocks: use a version that the plug-in knows.")
        slots = np.asarray(batch.idx_mapping_np[:count], dtype=np.int64)
        lengths = np.diff(batch.query_start_loc_np[: count + 1]).astype(np.int64)
        prompts = Prompts.of(batch, slice(drafts, count), lengths[drafts:], size, device)
        starts = batch.query_start_loc[:count].long()
        return cls(batch.idx_mapping[:count].long(), slots, drafts, starts, lengths, prompts)


class Prompts(NamedTuple):
    """Chunks of prompts, p of them; a request that comes back has its text so far as a prompt.

    Attributes:
        border: (p,) long, position behind the last whole block of the prompt.
        total: (p,) long, tokens of the prompt.
        is_last: (p,) bool, the chunk ends the prompt.
        closes: (p,) bool, the chunk holds the position before `border`.
        before: (p,) long, number of that position among the tokens of the request's chunk.
        closes_on_host: (p,) `closes` on the host.
    """

    border: Tensor
    total: Tensor
    is_last: Tensor
    closes: Tensor
    before: Tensor
    closes_on_host: np.ndarray

    @classmethod
    def of(cls, batch: Any, where: slice, lengths: np.ndarray, size: int, device: torch.device) -> "Prompts":
        total = batch.prefill_len_np[where].astype(np.int64)
        begin = batch.num_computed_prefill_tokens_np[where].astype(np.int64)
        stop, border = begin + lengths, total // size * size
        closes = (begin < border) & (border <= stop)
        numbers = np.stack([border, total, stop >= total, closes, border - 1 - begin])
        if len(total):
            border, total, is_last, closing, before = async_tensor_h2d(numbers, device=device).unbind(0)
        else:
            border, total, is_last, closing, before = torch.zeros(5, 0, dtype=torch.long, device=device).unbind(0)
        return cls(border, total, is_last.bool(), closing.bool(), before, closes)


@dataclass
class Scored:
    """Positions that are scored with the same options, in the order of the step's logits.

    Args:
        number: of the options.
        rows: (N,) request of the step.
        places: (N,) position of its block; S = the next block's first one; S + 1 = nobody reads it.
        count: N, at least as many as there are.
        members: (n,) bool, requests with these options; None = all.
    """

    number: int
    rows: Tensor
    places: Tensor
    count: int
    members: Tensor | None


@dataclass
class StepPlan:
    """What a step is about.

    Args:
        batch: its requests.
        fixed, moving: their numbers.
        canvas: (d, S) long, blocks in work.
        now: what their next positions are; of the d requests.
        denoises: (d,) bool, requests that denoise; the others commit.
        scored_by: the positions to score, by options.
        scored: N, how many.
    """

    batch: Batch
    fixed: Fixed
    moving: Moving
    canvas: Tensor
    now: Candidates
    denoises: Tensor
    scored_by: list[Scored]
    scored: int

    @property
    def size(self) -> int:
        return self.canvas.shape[1]

    def indices(self, token_shift: bool) -> Tensor:
        """(N,) numbers of the tokens whose raw outputs score the positions, among those of the step."""
        rows = torch.cat([scored.rows for scored in self.scored_by])
        places = torch.cat([scored.places for scored in self.scored_by])
        # The next block's first position is scored at the end of this one, or of the prompt's last whole block.
        at_end = torch.cat([torch.full_like(self.canvas[:, 0], self.size - 1), self.batch.prompts.before])
        offset = torch.where(places == self.size, at_end[rows], places - int(token_shift))
        return (self.batch.starts[rows] + offset).clamp(min=0, max=int(self.batch.lengths.sum()) - 1)


def texts_of(canvas: Tensor, fixed: Fixed, begin: Tensor) -> Texts:
    """(B, S) blocks that begin at the positions (B,), as the functions of the block decoder read them."""
    anywhere = torch.ones_like(canvas, dtype=torch.bool)
    return Texts(canvas, anywhere, fixed.prompt_end - begin, fixed.end - begin, torch.zeros_like(begin))


def make_plan(rows: Rows, batch: Batch) -> StepPlan:
    """Plans a step."""
    drafts, size = batch.drafts, rows.config.block_size
    fixed, moving = rows.read_fixed(batch.slots), rows.read_moving(batch.slots)
    blocks = batch.slots[:drafts]
    canvas = rows.canvas[blocks]
    of_blocks = Fixed(*(each[:drafts] for each in fixed))
    now = find_candidates(
        texts_of(canvas, of_blocks, moving.begin[:drafts]),
        rows.stops[blocks][:, None],
        of_blocks.size,
        rows.config.mask_token_id,
    )
    denoises = moving.commits[:drafts] == 0
    wanted = torch.zeros(len(batch.slots), size + 1, dtype=torch.bool, device=canvas.device)
    wanted[:drafts, :size] = now.candidates & denoises[:, None]
    if rows.config.token_shift:
        wanted[:drafts, size] = ~denoises
        wanted[drafts:, size] = batch.prompts.closes
    scored_by = list(_by_options(rows, batch, wanted))
    return StepPlan(batch, fixed, moving, canvas, now, denoises, scored_by, sum(each.count for each in scored_by))


def _by_options(rows: Rows, batch: Batch, wanted: Tensor) -> "list[Scored]":
    """Lists the wanted positions, (n, S + 1) bool, those of equal options together."""
    closing = batch.prompts.closes_on_host if rows.config.token_shift else np.zeros_like(batch.prompts.closes_on_host)
    # At most a sub-block of a request is scored, so that nobody has to ask the device how many positions it is.
    most = np.concatenate([rows.sizes[batch.slots_on_host[: batch.drafts]], closing.astype(np.int64)])
    numbers = rows.groups[batch.slots_on_host]
    members, found = None, []
    for number in np.unique(numbers):
        is_member = numbers == number
        if not is_member.all():
            members = async_tensor_h2d(is_member, device=wanted.device)
        count = int(most[is_member].sum())
        if count == 0:
            continue
        mine = wanted if members is None else wanted & members[:, None]
        among, places = torch.nonzero_static(mine, size=count, fill_value=-1).unbind(1)
        places = torch.where(among < 0, wanted.shape[1], places)
        found.append(Scored(int(number), among.clamp(min=0), places, count, members))
    return found
