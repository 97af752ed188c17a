"""Plans of denoise steps: the positions that a step scores, and the forwards that score them.

Legend: B rows still being decoded, n of them that a forward runs, S positions of a block, s of a part of it,
N positions that a step scores.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache_relay import rows_of
from .generation_candidates_relay import Candidates, Texts, find_candidates, progress_before
from .generation_grid_relay import DecodingGrid
from .generation_options_relay import DecodingOptions
from .generation_shortcuts_relay import Part, SubBlockCache
from .unmasking_relay import Progress


@dataclass
class Block:
    """The block in work.

    Args:
        columns: the block's columns in the grid.
        texts: the block of each row; its tokens are those of the grid.
        masks_at_begin: (B,) number of each row's positions that were masked, at least 1.
        sub_block: (B,) long, number of the sub-block that each row's last step was about.
        progress: each row's steps within its sub-block.
        shortcut: decides which forwards run a part of the block only; None = all of them run the whole block.
        is_new: no forward has run the block yet.
    """

    columns: slice
    texts: Texts
    masks_at_begin: Tensor
    sub_block: Tensor
    progress: Progress
    shortcut: SubBlockCache | None
    is_new: bool = True


@dataclass
class Forward:
    """One denoise forward, before it runs.

    Args:
        rows: (n,) rows that the forward runs; None = all.
        part: (n, s) positions of the block that the forward runs; None = all.
        where: (N,) rows and (N,) positions of the block that the forward scores.
        scored: the same positions, counted among the rows and positions that the forward runs.
        masks: how many [MASK]s the forward runs; None = the channel does not read it.
    """

    rows: Tensor | None
    part: Tensor | None
    where: tuple[Tensor, Tensor]
    scored: tuple[Tensor, Tensor]
    masks: int | None


@dataclass
class Step:
    """One denoise step of all rows: one forward, or two if some rows need their whole block and others do not.

    Args:
        masked: (B, S) bool, masked positions of the rows' own texts.
        candidates: (B, S) bool, masked positions that the step scores.
        certain: (B, S) bool, candidates that the step reveals without asking the policy.
        active: (B,) bool, rows that take part in the step.
        sub_block: (B,) long, number of the sub-block that each row's candidates are in.
        begins: (B,) long, position of the block at which that sub-block begins; negative if the block cuts it off.
        progress: each row's steps within its sub-block, before this one.
        end: (B,) column behind the last token, known stop tokens considered.
        ends: the same numbers on the host.
        forwards: the forwards to run, none if the block is complete.
    """

    masked: Tensor
    candidates: Tensor
    certain: Tensor
    active: Tensor
    sub_block: Tensor
    begins: Tensor
    progress: Progress
    end: Tensor
    ends: list[int]
    forwards: list[Forward] = field(default_factory=list)


class Size(NamedTuple):
    """What the host has to know of a part before its forward can run.

    Args:
        rows: rows that run it.
        scored: positions that are scored.
        length: positions of each row that pass the network; not read if that is the whole block.
        masks: how many [MASK]s pass the network; None = the channel does not read it.
    """

    rows: int
    scored: int
    length: int
    masks: int | None = None


@dataclass
class StepPlanner:
    """Plans the steps of one batch.

    Args:
        grid: the rows of the batch.
        options: options of this `generate`.
        config: configuration of the model.
        stops: (n,) tokens that end a row, or None.
        is_watched: somebody is shown every step, so that no forward may run in vain.
    """

    grid: DecodingGrid
    options: DecodingOptions
    config: Any
    stops: Tensor | None
    is_watched: bool

    def __post_init__(self) -> None:
        self.size = self.options.sub_block_size or self.grid.width
        self.is_canvas = self.config.block_size is None
        self.counts_masks = self.options.use_relay and self.config.channel_class.reads_distribution

    def plan(self, block: Block, is_committed: bool) -> Step:
        """Plans which positions to score next.

        It is the one place where a step waits for the device, and the first step of a block does not wait either.

        Args:
            block: the block in work.
            is_committed: a commit has scored the block's first position, if the model scores it there.
        """
        now = find_candidates(block.texts, self.stops, self.size, self.config.mask_token_id)
        step = Step(
            masked=now.masked,
            candidates=now.candidates,
            certain=torch.zeros_like(now.candidates),
            active=now.active,
            sub_block=now.sub_block,
            begins=now.begins,
            progress=self._advance(block, now),
            end=now.end + block.columns.start,
            ends=self.grid.ends,
        )
        if self.config.token_shift and not is_committed:
            # The fused commit scores the block's first token, as a commit of its own would; the policy has no say.
            step.certain[:, 0] = now.candidates[:, 0]
        whole = [Part(now.active, now.candidates, None, None)]
        parts = whole if block.shortcut is None else block.shortcut.parts(step)
        sizes = self._foreseen(block, is_committed) or self._read(block, step, parts)
        step.forwards = [
            self._forward_over(block, part, size) for part, size in zip(parts, sizes, strict=False) if size.scored
        ]
        return step

    def _advance(self, block: Block, now: Candidates) -> Progress:
        """Counts one more step of each active row; returns the progress before it."""
        before = progress_before(block.progress, block.sub_block, now, self.size, self.is_canvas)
        block.sub_block = now.sub_block.where(now.active, block.sub_block)
        block.progress = Progress(before.step + now.active, before.positions)
        return before

    def _foreseen(self, block: Block, is_committed: bool) -> list[Size]:
        """The size of a block's first forward, by what the host knows; nothing if it cannot know, or none is needed.

        It is too high where a commit has just revealed a stop token, which ends the row.
        """
        grid, begin, stop = self.grid, block.columns.start, block.columns.stop
        if not block.is_new or self.is_canvas or self.is_watched or stop > grid.visible_stop:
            return []
        firsts = self.first_masks(begin, is_committed)
        scored = [
            self.size - first % self.size
            for first, end in zip(firsts, grid.ends, strict=True)
            if begin + first < min(end, stop)
        ]
        masks = sum(grid.width - first for first in firsts) if self.counts_masks else None
        return [Size(len(scored), sum(scored), grid.width, masks)] if scored else []

    def first_masks(self, begin: int, is_committed: bool) -> list[int]:
        """Position of each row's first mask in the block at column `begin`, as far as the host knows.

        Only in models with blocks. A row may have ended with the token that a commit has just revealed.
        """
        known = int(self.config.token_shift and is_committed and begin > 0)
        return [max(prompt_end - begin, known) for prompt_end in self.grid.prompt_ends]

    def _read(self, block: Block, step: Step, parts: list[Part]) -> list[Size]:
        """Waits for the device, which has the sizes of the parts and the ends of the rows."""
        numbers: list[Tensor] = []
        for part in parts:
            rows = part.rows.sum()
            numbers += [rows, part.candidates.sum(), rows if part.length is None else part.length]
            numbers += [self._masks(block, part)] if self.counts_masks else []
        read = torch.cat([torch.stack(numbers), step.end]).tolist()
        step.ends = read[len(numbers) :]
        each = len(numbers) // len(parts)
        return [Size(*read[i : i + each]) for i in range(0, len(numbers), each)]

    def _masks(self, block: Block, part: Part) -> Tensor:
        """How many [MASK]s the forward over a part runs, a scalar; a position that is run twice counts twice."""
        is_mask = self.grid.tokens[:, block.columns] == self.config.mask_token_id
        if part.begins is None or part.length is None:
            return (is_mask if block.is_new else is_mask & part.rows[:, None]).sum()
        step = torch.arange(self.grid.width + self.size, device=is_mask.device)
        return (is_mask.gather(1, self._run(part.begins, step)) & (step < part.length) & part.rows[:, None]).sum()

    def _run(self, begins: Tensor, step: Tensor) -> Tensor:
        """Positions of a part of the block; where the block cuts it off, the first or last position is repeated.

        Args:
            begins: (n,) where each row's part begins.
            step: (s,) 0, 1, ..
        """
        return (begins[:, None] + step).clamp(min=0, max=self.grid.width - 1)

    def _forward_over(self, block: Block, part: Part, size: Size) -> Forward:
        """Builds the forward over a part; `nonzero_static` need not wait for the device, as it is given the size."""
        # Where fewer are scored than were foreseen, the rest repeats the block's first position in row 0. A commit has
        # revealed it, so that nobody reads what is scored there.
        rows, places = torch.nonzero_static(part.candidates, size=size.scored, fill_value=0).unbind(-1)
        scored, scored_places, among = rows, places, None
        # The first forward of a block runs all rows, so that memory and state are those of all.
        if size.rows < len(part.rows) and not block.is_new:
            among = torch.nonzero_static(part.rows, size=size.rows)[:, 0]
            scored = (part.rows.cumsum(0) - 1)[rows]
        if part.begins is None:
            return Forward(among, None, (rows, places), (scored, scored_places), size.masks)
        run = self._run(rows_of(part.begins, among), torch.arange(size.length, device=rows.device))
        return Forward(among, run, (rows, places), (scored, places - part.begins[rows]), size.masks)
