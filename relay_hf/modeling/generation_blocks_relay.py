"""The block decoder: prefill the prompt, then denoise and commit one block after the other; rows leave as they end.

Legend: B rows still being decoded, n of them that take part in a forward, W columns of the grid, S positions of a
block, s of a part of it, N positions that a step scores.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cache_relay import RelayCache, rows_of
from .generation_grid_relay import DecodingGrid, RevealRecorder
from .generation_options_relay import DecodingOptions
from .generation_shortcuts_relay import SubBlockCache, state_of_part
from .generation_start_relay import RelayStart
from .generation_steps_relay import Block, Forward, Step, StepPlanner
from .generation_stopping_relay import Stopping
from .generation_tokens_relay import Choice, TokenChooser, uniform_numbers
from .outputs_relay import RelayGenerateOutput
from .prefix_relay import denoise
from .unmasking_relay import Progress


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
        self.shows_drafts = hasattr(self.streamer, "put_draft")
        self.planner = StepPlanner(grid, self.options, config, self.stopping, is_watched=self.shows_drafts)
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
            self._retire(columns.stop)
            if columns.stop == final_column or not grid.ends:
                break
            # 4. Commit the block.
            if self.options.fuse_commits:
                self.uncommitted = grid.width
            else:
                self._commit(begin, columns.stop)
                self.commit_forwards[grid.rows] += grid.end > columns.stop
                self._reveal_first(columns.stop)
            begin = columns.stop
        if self.streamer is not None:
            self.streamer.end()
        self._finish()
        return self._output()

    def _retire(self, stop: int) -> None:
        """Drops the rows that end before column `stop`."""
        if (alive := self.grid.retire(stop)) is not None and len(alive):
            self.cache.batch_select_indices(alive)

    def _finish(self) -> None:
        """Gives back memory behind the committed text."""
        self.cache.trim()

    # -- committed blocks -------------------------------------------------------------------------------------------

    def _commit(self, begin: int, stop: int) -> None:
        """Writes complete columns to the cache, without any relay state."""
        ids, prefix = self.grid.tokens[:, begin:stop], self.cache.prefix(is_one_block=False, is_aligned=True)
        self.model(
            ids,
            attention_mask=self.grid.attention_mask(stop),
            position_ids=self.grid.positions(begin, stop),
            cache=prefix,
            logits_to_keep=self.grid.rows.new_empty(0),
            output_relay_state=False,
        )
        self.cache.commit(prefix, ids)

    def _reveal_first(self, column: int) -> None:
        """Reveals the first position of a block, which a token-shift model scored at the end of the block before."""
        grid, first = self.grid, slice(column, column + 1)
        if not self.token_shift or all(prompt_end > column for prompt_end in grid.prompt_ends):
            return
        is_masked = grid.tokens[:, first] == self.mask_token_id
        rows = torch.arange(len(grid.rows), device=is_masked.device)
        choice = self._choose(self.cache.last_hidden[:, 0], rows, column, torch.ones_like(rows))
        grid.tokens[:, first] = torch.where(is_masked, choice.tokens[:, None], grid.tokens[:, first])
        if self.recorder is not None:
            self.recorder.record(grid.rows, first, is_masked, choice.confidence[:, None])

    # -- one block --------------------------------------------------------------------------------------------------

    def _denoise(self, columns: slice) -> None:
        """Reveals the block's positions step by step; ends rows that reach a stop token.

        In every step the policy reveals a position of each row that takes part, or ends its schedule later. At least
        one takes part, unless a commit has just ended all of them: that becomes known behind the forward.
        """
        grid = self.grid
        nowhere = torch.full_like(grid.rows, torch.iinfo(torch.long).min)
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
        numbers = uniform_numbers(
            self.seeds[grid.rows[rows]], self.denoise_forwards[grid.rows[rows]], columns - grid.offset[rows]
        )
        logits = self.model.deciding_logits(head_inputs)
        return self.chooser(logits, grid.tokens[rows], share_left[rows][:, None], numbers)

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
        if self.shows_drafts:
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
            sequences=grid.as_given(grid.all_tokens, grid.prompts, self.stopping.padding, grid.most_new),
            denoise_forwards=self.denoise_forwards,
            commit_forwards=self.commit_forwards,
            prefill_forwards=self.prefill_forwards,
            tokens_per_forward=(grid.all_end - grid.all_prompt_end + filled) / forwards.clamp(min=1),
            reference_forwards=self.reference_forwards if self.start and self.start.reference_forwards else None,
            cache=self.cache,
            history=None if self.recorder is None else self.recorder.history(grid, self.denoise_forwards),
        )
