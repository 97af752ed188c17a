"""The block decoder: prefill the prompt, then denoise and commit one block after the other; rows leave as they end.

Legend: B rows still being decoded, n of them that take part in a forward, W columns of the grid, S positions of a
block, s of a part of it, N positions that a step scores.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cache_relay import RelayCache, rows_of
from .generation_given_relay import GivenBatch
from .generation_grid_relay import DecodingGrid
from .generation_options_relay import DecodingOptions
from .generation_shortcuts_relay import SubBlockCache, state_of_part
from .generation_start_relay import RelayStart
from .generation_steps_relay import Block, Forward, Step, StepPlanner
from .generation_tokens_relay import Choice, TokenChooser, uniform_numbers
from .outputs_relay import RelayGenerateOutput
from .prefix_relay import denoise
from .unmasking_relay import Progress


@dataclass
class BlockDecoder:
    """Decodes rows side by side; made anew by every `generate`.

    `run` decodes them all. Whoever has more rows than one call calls `prefill` and then `step_block` until no row is
    left; in between, rows of other decoders `join`, and those of a batch can be dropped.

    Args:
        model: the `RelayForMaskedDiffusion`.
        cache: empty, or the cache of an earlier turn of the only row's conversation; filled while decoding.
        grid: the rows.
        options: options of this `generate`.
        chooser: chooses the token of each scored position.
        start: writes the state of each block's first step; None = the model's initial state.
    """

    model: Any
    cache: RelayCache
    grid: DecodingGrid
    options: DecodingOptions
    chooser: TokenChooser
    start: RelayStart | None

    def __post_init__(self) -> None:
        config = self.model.config
        self.mask_token_id: int = config.mask_token_id
        self.token_shift: bool = config.token_shift
        self.stops: Tensor | None = self.grid.batches[0].stopping.token_ids
        self.planner = self._plan()
        self.is_prefilled = False
        self.uncommitted = 0  # columns before the block that the next denoise forward commits

    def _plan(self) -> StepPlanner:
        return StepPlanner(self.grid, self.options, self.model.config, self.stops, is_watched=self.shows_drafts)

    @property
    def shows_drafts(self) -> bool:
        """Whether some streamer is shown every step."""
        return any(batch.shows_drafts for batch in self.grid.batches)

    def run(self) -> RelayGenerateOutput:
        """Decodes the rows of one `generate` to their ends."""
        (batch,) = self.grid.batches
        self.prefill()
        while self.grid.ends:
            self.step_block()
        self.finish()
        return self.output(batch, self.cache)

    def prefill(self) -> None:
        """Commits the whole blocks of the prompts that an earlier turn has not committed."""
        grid, begin = self.grid, self.grid.begin
        self.cache.reserve(grid.tokens.shape[1])
        # A token-shift model aligns the next block with the hidden state before it, which only a commit leaves.
        recommitted = grid.width if self.token_shift else 0
        if (known := self.cache.keep_shared(grid.tokens[:, :begin], grid.width, recommitted)) < begin:
            self._commit(known, begin)
            grid.prefill_forwards += begin - grid.offset > known
        if begin > 0:
            self._reveal_first(begin)
        self.is_prefilled = True

    def step_block(self) -> list[GivenBatch]:
        """Decodes one block of every row, and commits it for those that go on.

        Returns:
            The batches that have ended with it.
        """
        grid, columns, batches = self.grid, self.grid.block, self.grid.batches
        # 1. Denoise the block, step by step.
        self._denoise(columns)
        # 2. End rows, and drop the ended ones.
        for batch, rows in grid.parts():
            batch.stopping.apply(grid, batch, rows, columns)
        self._stream(columns)
        self._retire(columns.stop)
        ended = [batch for batch in batches if not batch.count]
        for batch in ended:
            if batch.streamer is not None:
                batch.streamer.end()
        if not grid.ends:
            return ended
        # 3. Commit the block, whose columns have moved if those of a row that has left are gone.
        columns = grid.block
        grid.begin = columns.stop
        if self.options.fuse_commits:
            self.uncommitted = grid.width
        else:
            self._commit(columns.start, columns.stop)
            grid.commit_forwards += grid.end > columns.stop
            self._reveal_first(columns.stop)
        return ended

    def finish(self) -> None:
        """Gives back memory behind the committed text."""
        self.cache.trim()

    def output(self, batch: GivenBatch, cache: RelayCache | None = None) -> RelayGenerateOutput:
        """What `generate` returns for a batch that has ended."""
        return batch.output(cache, bool(self.start and self.start.reference_forwards))

    # -- rows that leave and come -----------------------------------------------------------------------------------

    @property
    def takes_rows(self) -> bool:
        """Whether rows of other decoders may join these; a record of reveals cannot grow."""
        return not self.options.output_history

    def can_join(self, other: "BlockDecoder") -> bool:
        """Whether `join` takes the rows of another decoder with equal options: both are prefilled, or neither."""
        return self.takes_rows and other.takes_rows and self.is_prefilled == other.is_prefilled

    def join(self, other: "BlockDecoder") -> None:
        """Takes the rows of another decoder, which is not used afterwards, between two blocks.

        Args:
            other: a decoder of the same model, whose options differ from these in what concerns single rows only: their
                number of new tokens, seeds, stopping criteria and streamers. `can_join` holds.
        """
        grid, cache = self.grid, other.cache
        rows, begin = (len(grid.ends), len(other.grid.ends)), max(grid.begin, other.grid.begin)
        if self.uncommitted and cache.get_seq_length():
            # The next forward commits a block of every row: of these, the last one of their prompts, once more.
            cache.reopen(grid.width)
        grid.join(other.grid)
        self.cache.reserve(grid.tokens.shape[1])
        if self.is_prefilled:
            self.cache.join(cache, rows, begin - self.uncommitted)
        self.planner = self._plan()

    def drop(self, batch: GivenBatch) -> None:
        """Takes the rows of a batch out between two blocks, whatever they have come to."""
        grid = self.grid
        stays = [row for other, rows in grid.parts() if other is not batch for row in range(rows.start, rows.stop)]
        kept = torch.tensor(stays, dtype=torch.long, device=grid.tokens.device)
        grid.keep(kept, stays, grid.begin)
        self._drop_columns(kept)

    def _retire(self, stop: int) -> None:
        """Drops the rows that end before column `stop`."""
        if (alive := self.grid.retire(stop)) is not None:
            self._drop_columns(alive)

    def _drop_columns(self, alive: Tensor) -> None:
        """Lets the cache follow the grid, in which only these rows are left; drops columns that they do not need."""
        if len(alive):
            self.cache.batch_select_indices(alive)
            if count := self.grid.trim():
                self.cache.drop_columns(min(count, self.cache.get_seq_length()))
                # Rows that are left may begin with the block in work, and have nothing before it to commit.
                self.uncommitted = min(self.uncommitted, self.grid.begin)
            self.cache.reserve(self.grid.tokens.shape[1])

    # -- committed blocks -------------------------------------------------------------------------------------------

    def _commit(self, begin: int, stop: int) -> None:
        """Writes complete columns to the cache, without any relay state."""
        ids, prefix = self.grid.tokens[:, begin:stop], self.cache.prefix(is_one_block=False, is_aligned=True)
        self.model(
            ids,
            attention_mask=self.grid.attention_mask(stop),
            position_ids=self.grid.positions(begin, stop),
            cache=prefix,
            logits_to_keep=self.grid.seeds.new_empty(0),
            output_relay_state=False,
        )
        self.cache.commit(prefix, ids)

    def _reveal_first(self, column: int) -> None:
        """Reveals the first position of a block, which a token-shift model scored at the end of the block before."""
        grid, first = self.grid, slice(column, column + 1)
        if not self.token_shift or all(prompt_end > column for prompt_end in grid.prompt_ends):
            return
        is_masked = grid.tokens[:, first] == self.mask_token_id
        rows = torch.arange(len(grid.ends), device=is_masked.device)
        choice = self._choose(self.cache.last_hidden[:, 0], rows, column, torch.ones_like(rows))
        grid.tokens[:, first] = torch.where(is_masked, choice.tokens[:, None], grid.tokens[:, first])
        self._record(first, is_masked, choice.confidence[:, None])

    # -- one block --------------------------------------------------------------------------------------------------

    def _denoise(self, columns: slice) -> None:
        """Reveals the block's positions step by step; ends rows that reach a stop token.

        In every step the policy reveals a position of each row that takes part, or ends its schedule later. At least
        one takes part, unless a commit has just ended all of them: that becomes known behind the forward.
        """
        grid = self.grid
        nowhere = torch.full_like(grid.seeds, torch.iinfo(torch.long).min)
        texts = grid.texts(columns)
        block = Block(
            columns,
            texts,
            masks_at_begin=texts.masked(self.mask_token_id).sum(-1).clamp(min=1),
            sub_block=nowhere,
            progress=Progress(torch.zeros_like(nowhere), torch.zeros_like(nowhere)),
            shortcut=SubBlockCache.of(self.options, self.model.config, nowhere),
        )
        self.cache.write_relay_state(None)
        while (step := self.planner.plan(block, is_committed=not self.uncommitted)).forwards:
            if self.start is not None and block.is_new:
                self.start(self, block, step)
            head_inputs = torch.cat([self._forward(block, forward) for forward in step.forwards])
            self._reveal(block, step, head_inputs)
        grid.move_ends(step.end, step.ends)

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
        width = None if part is None else grid.width
        prefix = self.cache.prefix(rows, part, width, is_one_block=before == 0, is_aligned=True, masks=forward.masks)
        visible = grid.attention_mask(stop)
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
            attention_mask=None if visible is None else rows_of(visible, rows),
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
            return self.chooser.best(self.model, head_inputs)
        numbers = uniform_numbers(grid.seeds[rows], grid.denoise_forwards[rows], columns - grid.offset[rows])
        logits = self.model.deciding_logits(head_inputs)
        return self.chooser(logits, grid.tokens[rows], share_left[rows][:, None], numbers)

    def _reveal(self, block: Block, step: Step, head_inputs: Tensor) -> None:
        """Writes the tokens that the policy reveals, given the (N, D) inputs of the head at the scored positions."""
        grid, columns = self.grid, block.columns
        grid.denoise_forwards += step.active
        rows, places = (torch.cat(each) for each in zip(*[forward.where for forward in step.forwards], strict=True))
        share_left = step.masked.sum(-1) / block.masks_at_begin
        choice = self._choose(head_inputs, rows, columns.start + places, share_left)
        nothing = torch.zeros(step.masked.shape, device=step.masked.device)
        confidence, measure = (nothing.index_put((rows, places), n) for n in (choice.confidence, choice.measure))
        revealed = self.options.policy(measure, step.candidates & ~step.certain, step.progress) | step.certain
        before = grid.tokens[:, columns]
        grid.tokens[:, columns] = torch.where(revealed, before.index_put((rows, places), choice.tokens), before)
        self._record(columns, revealed, confidence, grid.denoise_forwards)
        self._stream_drafts(columns)

    def _record(self, columns: slice, revealed: Tensor, confidence: Tensor, forwards: Tensor | None = None) -> None:
        """Notes reveals for the history of the only batch that asks for one; arguments of `RevealRecorder.record`."""
        batch = self.grid.batches[0]
        if batch.recorder is not None:
            batch.recorder.record(batch.rows, batch.columns(columns), revealed, confidence, forwards)

    # -- what comes out ---------------------------------------------------------------------------------------------

    def _stream(self, columns: slice) -> None:
        for batch, rows in self.grid.parts():
            if batch.streamer is not None and len(shown := self.grid.shown(rows.start, columns)):
                batch.streamer.put(shown)

    def _stream_drafts(self, columns: slice) -> None:
        for batch, rows in self.grid.parts():
            if batch.shows_drafts:
                batch.streamer.put_draft(self.grid.shown(rows.start, columns))
