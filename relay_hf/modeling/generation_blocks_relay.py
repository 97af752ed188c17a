"""The block decoder: prefill the prompt, then denoise and commit one block after the other; rows leave as they end.

Legend: B rows still being decoded, n of them that take part in a forward, W columns of the grid, S positions of a
block, s of a part of it, N positions that a step scores.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .attention_relay import BlockAttention
from .cache_relay import RelayCache, rows_of
from .generation_grid_relay import DecodingGrid, RevealRecorder
from .generation_options_relay import DecodingOptions
from .generation_shortcuts_relay import Part, SubBlockCache, state_of_part
from .generation_start_relay import RelayStart
from .generation_stopping_relay import Stopping
from .generation_tokens_relay import Choice, TokenChooser, other_than_mask, uniform_numbers
from .outputs_relay import RelayGenerateOutput
from .prefix_relay import denoise
from .unmasking_relay import Progress, in_earliest_sub_block, sub_blocks_of


@dataclass
class Block:
    """The block in work.

    Args:
        columns: the block's columns in the grid.
        masks_at_begin: (B,) number of each row's positions that were masked, at least 1.
        sub_block: (B,) long, number of the sub-block that each row's last step was about.
        progress: each row's steps within its sub-block.
        shortcut: decides which forwards run a part of the block only; None = all of them run the whole block.
        attention: attention masks of the block's forwards.
        is_new: no forward has run the block yet.
    """

    columns: slice
    masks_at_begin: Tensor
    sub_block: Tensor
    progress: Progress
    shortcut: SubBlockCache | None
    attention: BlockAttention
    is_new: bool = True


@dataclass
class Forward:
    """One denoise forward, before it runs.

    Args:
        rows: (n,) rows that the forward runs; None = all.
        part: (n, s) positions of the block that the forward runs; None = all.
        where: (N,) rows and (N,) positions of the block that the forward scores.
        scored: the same positions, counted among the rows and positions that the forward runs.
    """

    rows: Tensor | None
    part: Tensor | None
    where: tuple[Tensor, Tensor]
    scored: tuple[Tensor, Tensor]


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
        forwards: the forwards to run, none if the block is complete.
    """

    masked: Tensor
    candidates: Tensor
    certain: Tensor
    active: Tensor
    sub_block: Tensor
    begins: Tensor
    progress: Progress
    forwards: list[Forward] = field(default_factory=list)


@dataclass
class BlockDecoder:
    """Decodes one batch; made anew by every `generate`.

    Args:
        model: the `RelayForMaskedDiffusion`.
        cache: empty, or the cache of an earlier turn of the only row's conversation; filled while decoding.
        grid: the rows of the batch, side by side.
        options: options of this `generate`.
        chooser: chooses the token of each scored position.
        seeds: (B,) long, seeds of the random numbers that a row's tokens are drawn with.
        start: writes the state of each block's first step; None = the model's initial state.
        stopping: ends rows.
        streamer: receives the finished blocks of the only row, and drafts if it has a method `put_draft`.
    """

    model: Any
    cache: RelayCache
    grid: DecodingGrid
    options: DecodingOptions
    chooser: TokenChooser
    seeds: Tensor
    start: RelayStart | None
    stopping: Stopping
    streamer: Any

    def __post_init__(self) -> None:
        grid, config = self.grid, self.model.config
        self.mask_token_id: int = config.mask_token_id
        self.token_shift: bool = config.token_shift
        self.is_canvas = config.block_size is None
        self.recorder = RevealRecorder(grid.tokens) if self.options.output_history else None
        self.uncommitted = 0  # columns before the block that the next denoise forward commits
        # (B,) forwards of each row of the batch.
        self.denoise_forwards, self.commit_forwards, self.prefill_forwards, self.reference_forwards = torch.zeros(
            4, len(grid.rows), dtype=torch.long, device=grid.tokens.device
        )

    def run(self) -> RelayGenerateOutput:
        """Decodes all rows to their ends."""
        grid = self.grid
        begin, final_column = grid.prefix, grid.tokens.shape[1]
        self.cache.reserve(final_column)
        # 1. Prefill: the whole blocks of the prompts that an earlier turn has not committed.
        # A token-shift model aligns the next block with the hidden state before it, which only a commit leaves.
        recommitted = grid.width if self.token_shift else 0
        if (known := self.cache.keep_shared(grid.tokens[:, :begin], grid.width, recommitted)) < begin:
            self._commit(known, begin)
            self.prefill_forwards += grid.starts > known
        if begin > 0:
            self._reveal_first(begin)
        while True:
            # 2. Denoise the block, step by step.
            columns = slice(begin, begin + grid.width)
            self._denoise(columns)
            # 3. End rows, and drop the ended ones.
            self.stopping.apply(grid, columns)
            self._stream(columns)
            if (alive := grid.retire(columns.stop)) is not None and len(alive):
                self.cache.batch_select_indices(alive)
            if columns.stop == final_column or len(grid.rows) == 0:
                break
            # 4. Commit the block.
            if self.options.fuse_commits:
                self.uncommitted = grid.width
            else:
                self._commit(begin, columns.stop)
                self.commit_forwards[grid.rows] += 1
                self._reveal_first(columns.stop)
            begin = columns.stop
        if self.streamer is not None:
            self.streamer.end()
        return self._output()

    # -- committed blocks -------------------------------------------------------------------------------------------

    def _commit(self, begin: int, stop: int) -> None:
        """Writes complete columns to the cache, without any relay state."""
        self.model(
            self.grid.tokens[:, begin:stop],
            attention_mask=self.grid.attention_mask(stop),
            position_ids=self.grid.positions(begin, stop),
            cache=self.cache,
            logits_to_keep=self.grid.rows.new_empty(0),
            output_relay_state=False,
        )

    def _reveal_first(self, column: int) -> None:
        """Reveals the first position of a block, which a token-shift model scored at the end of the block before."""
        grid, first = self.grid, slice(column, column + 1)
        is_masked = grid.tokens[:, first] == self.mask_token_id
        if not (self.token_shift and bool(is_masked.any())):
            return
        rows = torch.arange(len(grid.rows), device=is_masked.device)
        choice = self._choose(self.cache.last_hidden[:, 0], rows, column, torch.ones_like(rows))
        grid.tokens[:, first] = torch.where(is_masked, choice.tokens[:, None], grid.tokens[:, first])
        if self.recorder is not None:
            self.recorder.record(grid.rows, first, is_masked, choice.confidence[:, None])

    # -- one block --------------------------------------------------------------------------------------------------

    def _denoise(self, columns: slice) -> None:
        """Reveals the block's positions step by step; ends rows that reach a stop token.

        In every step at least one row takes part, and the policy reveals a position of it or ends its schedule later.
        """
        grid = self.grid
        nowhere = torch.full_like(grid.rows, torch.iinfo(torch.long).min)
        block = Block(
            columns,
            masks_at_begin=grid.masked(columns).sum(-1).clamp(min=1),
            sub_block=nowhere,
            progress=Progress(torch.zeros_like(nowhere), torch.zeros_like(nowhere)),
            shortcut=SubBlockCache.of(self.options, self.model.config, nowhere),
            attention=BlockAttention(self.model, grid.attention_mask(columns.stop)),
        )
        self.cache.write_relay_state(None)
        while (step := self._plan(block)).forwards:
            if self.start is not None and block.is_new:
                self.start(self, block, step)
            head_inputs = torch.cat([self._forward(block, forward) for forward in step.forwards])
            self._reveal(block, step, head_inputs)
        grid.end = torch.minimum(grid.end, self.stopping.first_stop_token(grid, columns) + 1)

    def _plan(self, block: Block) -> Step:
        """Plans which positions to score next; the one place where a step waits for the device."""
        grid, columns = self.grid, block.columns
        size = self.options.sub_block_size or grid.width
        masked = grid.masked(columns)
        column = torch.arange(columns.start, columns.stop, device=masked.device)  # (S,)
        # Masks behind the row's end or its stop token need no forward.
        end = torch.minimum(grid.end, self.stopping.first_stop_token(grid, columns))
        needed = masked & (column < end[:, None])
        active = needed.any(-1)
        sub_blocks = sub_blocks_of(grid.width, size, grid.anchor - columns.start)  # (B, S)
        candidates = masked & in_earliest_sub_block(needed, sub_blocks) & active[:, None]
        sub_block = sub_blocks.gather(1, needed.long().argmax(-1, keepdim=True))[:, 0]  # (B,)
        step = Step(
            masked=masked,
            candidates=candidates,
            certain=torch.zeros_like(candidates),
            active=active,
            sub_block=sub_block,
            begins=grid.anchor - columns.start + sub_block * size,
            progress=self._advance(block, active, sub_block, candidates.sum(-1)),
        )
        if self.token_shift and self.uncommitted:
            # The fused commit scores the block's first token, as a commit of its own would; the policy has no say.
            step.certain[:, 0] = candidates[:, 0]
        parts = [Part(active, None, active.sum())] if block.shortcut is None else block.shortcut.parts(step)
        numbers = [n for p in parts for n in (p.rows.sum(), (step.candidates & p.rows[:, None]).sum(), p.length)]
        counts = torch.stack(numbers).view(-1, 3).tolist()
        step.forwards = [
            self._forward_over(block, step, part, *numbers)
            for part, numbers in zip(parts, counts, strict=True)
            if numbers[1]
        ]
        return step

    def _advance(self, block: Block, active: Tensor, sub_block: Tensor, masks: Tensor) -> Progress:
        """Counts one more step of each active row; returns the progress before it.

        In a block model, the steps are for all positions of a sub-block, prompt included, as SDAR counts them; on a
        canvas, for those that were masked at the sub-block's first step.

        Args:
            block: the block in work; its `sub_block` and `progress` are brought up to date.
            active: (B,) bool, rows that take part in the step.
            sub_block: (B,) long, sub-block that each row's step is about.
            masks: (B,) long, masked positions of that sub-block.
        """
        is_new = active & (sub_block != block.sub_block)
        step, positions = block.progress
        size = self.options.sub_block_size or self.grid.width
        total = masks if self.is_canvas else torch.full_like(masks, size)
        before = Progress(step.where(~is_new, 0), positions.where(~is_new, total))
        block.sub_block = sub_block.where(active, block.sub_block)
        block.progress = Progress(before.step + active, before.positions)
        return before

    def _forward_over(self, block: Block, step: Step, part: Part, takers: int, count: int, length: int) -> Forward:
        """Builds the forward over a part of `takers` rows, `length` positions long, which scores `count` positions.

        The numbers are passed in so that `nonzero_static` need not wait for the device.
        """
        rows, places = torch.nonzero_static(step.candidates & part.rows[:, None], size=count).unbind(-1)
        scored, scored_places, among = rows, places, None
        # The first forward of a block runs all rows, so that memory and state are those of all.
        if takers < len(part.rows) and not block.is_new:
            among = torch.nonzero_static(part.rows, size=takers)[:, 0]
            scored = (part.rows.cumsum(0) - 1)[rows]
        if part.begins is None:
            return Forward(among, None, (rows, places), (scored, scored_places))
        run = rows_of(part.begins, among)[:, None] + torch.arange(length, device=rows.device)
        # Where the block cuts the part off, the block's last position is repeated.
        run = run.clamp(min=0, max=self.grid.width - 1)
        return Forward(among, run, (rows, places), (scored, places - part.begins[rows]))

    def _forward(self, block: Block, forward: Forward, injects: bool = True) -> Tensor:
        """Runs the network, commits the block before if `fuse_commits` left it, and stores the state for the next step.

        Args:
            block: the block in work.
            forward: the rows and positions to run and to score.
            injects: inject the state of the forward before, or the initial state.

        Returns:
            (N, D) inputs of the head at the scored positions.
        """
        grid, rows, part, before = self.grid, forward.rows, forward.part, self.uncommitted
        begin, stop = block.columns.start - before, block.columns.stop
        ids, positions = rows_of(grid.tokens[:, begin:stop], rows), grid.positions(begin, stop)
        positions = positions if len(positions) == 1 else rows_of(positions, rows)
        if part is not None:
            ids, positions = ids.gather(1, part), positions.expand(len(ids), -1).gather(1, part)
        state, receives = self._state(rows, part, len(ids)) if injects else None, None
        prefix = self.cache.prefix(rows, part, None if part is None else grid.width, is_one_block=before == 0)
        if before and state is not None:
            # The state never reaches committed keys and values.
            state = torch.cat([torch.zeros_like(state[:, :1]).expand(-1, before, -1), state], dim=1)
            receives = self.model.receives_state(ids)
            receives[:, :before] = False
        output = denoise(
            self.model,
            ids,
            prefix,
            state,
            (forward.scored[0], forward.scored[1] + before),
            receives=receives,
            leaves_state=self.options.use_relay,
            attention_mask=grid.attention_mask(stop) if before else block.attention.mask(prefix, ids.shape[1], rows),
            position_ids=positions,
        )
        if before:
            self.cache.commit(prefix, ids[:, :before])
        state = None if output.relay_state is None else output.relay_state[:, before:]
        if part is not None and state is not None:
            old = self.cache.read_relay_state(rows, part) if self.token_shift else None
            state = state_of_part(state, part, old)
        self.cache.write_relay_state(state, rows, part)
        block.is_new, self.uncommitted = False, 0
        return output.head_inputs

    def look(self, block: Block, step: Step) -> None:
        """Runs a step's forward with nothing injected and nothing scored, for the state that it leaves."""
        nothing = step.forwards[0].where[0][:0]
        self._forward(block, replace(step.forwards[0], scored=(nothing, nothing)), injects=False)

    def _state(self, rows: Tensor | None, part: Tensor | None, count: int) -> Tensor | None:
        """State to inject in a forward over `count` rows, or None."""
        if not self.options.use_relay:
            return None
        if self.cache.relay_state is None:
            return self.model.initial_relay_state(count, self.grid.width)
        return self.cache.read_relay_state(rows, part)

    # -- tokens -----------------------------------------------------------------------------------------------------

    def _choose(self, head_inputs: Tensor, rows: Tensor, columns: Tensor | int, share_left: Tensor) -> Choice:
        """Scores N positions, and chooses their tokens.

        Args:
            head_inputs: (N, D) inputs of the head at the positions.
            rows: (N,) rows of the positions.
            columns: (N,) columns of the grid, or one for all.
            share_left: (B,) share of each row's block that is still masked.
        """
        grid = self.grid
        if not self.chooser.needs_logits:
            confidence, tokens = self.model.best_tokens(head_inputs)
            return Choice(other_than_mask(tokens, self.mask_token_id), confidence, confidence)
        numbers = uniform_numbers(
            self.seeds[grid.rows[rows]], self.denoise_forwards[grid.rows[rows]], columns - grid.offset[rows]
        )
        return self.chooser(self.model.lm_head(head_inputs), grid.tokens[rows], share_left[rows][:, None], numbers)

    def _reveal(self, block: Block, step: Step, head_inputs: Tensor) -> None:
        """Writes the tokens that the policy reveals, given the (N, D) inputs of the head at the scored positions."""
        grid, columns = self.grid, block.columns
        self.denoise_forwards[grid.rows] += step.active
        rows, places = (torch.cat(each) for each in zip(*[forward.where for forward in step.forwards], strict=True))
        share_left = step.masked.sum(-1) / block.masks_at_begin
        choice = self._choose(head_inputs, rows, columns.start + places, share_left)
        nothing = torch.zeros(step.masked.shape, device=step.masked.device)
        confidence, measure = (nothing.index_put((rows, places), n) for n in (choice.confidence, choice.measure))
        revealed = self.options.policy(measure, step.candidates & ~step.certain, step.progress) | step.certain
        before = grid.tokens[:, columns]
        grid.tokens[:, columns] = torch.where(revealed, before.index_put((rows, places), choice.tokens), before)
        if self.recorder is not None:
            self.recorder.record(grid.rows, columns, revealed, confidence, self.denoise_forwards[grid.rows])
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(grid.shown(columns))

    # -- what comes out ---------------------------------------------------------------------------------------------

    def _stream(self, columns: slice) -> None:
        if self.streamer is not None and len(shown := self.grid.shown(columns)):
            self.streamer.put(shown)

    def _output(self) -> RelayGenerateOutput:
        grid = self.grid
        filled = ((grid.prompts == self.mask_token_id) & grid.is_text).sum(-1)
        forwards = self.denoise_forwards + self.commit_forwards + self.prefill_forwards
        return RelayGenerateOutput(
            sequences=grid.as_given(grid.all_tokens, grid.prompts, self.stopping.padding),
            denoise_forwards=self.denoise_forwards,
            commit_forwards=self.commit_forwards,
            prefill_forwards=self.prefill_forwards,
            tokens_per_forward=(grid.all_end - grid.all_prompt_end + filled) / forwards.clamp(min=1),
            reference_forwards=self.reference_forwards if self.start and self.start.reference_forwards else None,
            cache=self.cache,
            history=None if self.recorder is None else self.recorder.history(grid, self.denoise_forwards),
        )
