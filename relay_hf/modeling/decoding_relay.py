"""The block decoder: prefill, then per block denoise until it is known and commit it; rows leave as they finish.

Legend: B rows still being decoded, W columns of the grid, S positions of a block, s of a sub-block, N positions that a
step scores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import MaxTimeCriteria

from .cache_relay import RelayCache
from .choice_relay import Choice, TokenChooser, uniform_numbers
from .grid_relay import DecodingGrid
from .history_relay import RevealRecorder
from .options_relay import DecodingOptions
from .outputs_relay import RelayGenerateHistory, RelayGenerateOutput
from .passes_relay import Draft, ForwardPasses
from .reveal_relay import Progress, in_earliest_sub_block, sub_blocks_of
from .start_relay import RelayStart
from .stopping_relay import Stopping


@dataclass
class Step:
    """One denoise step of all rows: one forward, or two if some rows need their whole block and others do not.

    Args:
        block: (B, S) tokens as they are before it.
        masked: (B, S) bool, what is hidden of each row's own positions.
        candidates: (B, S) bool, those of them that it scores.
        certain: (B, S) bool, those that it reveals whatever the policy says of the others.
        active: (B,) bool, rows that take part.
        progress: of each row in its sub-block.
        drafts: the forwards.
    """

    block: Tensor
    masked: Tensor
    candidates: Tensor
    certain: Tensor
    active: Tensor
    progress: Progress
    drafts: list[Draft]


class BlockDecoder:
    """Decodes one batch; made anew by every `generate`.

    Args:
        model: called as `model(input_ids, ...)`, plus its head and its initial relay state.
        cache: empty, or of an earlier turn of the only row's conversation; filled while decoding.
        options: of one `generate`.
        chooser: which token to reveal at a position.
        seeds: (B,) long, of the random numbers that a row's tokens are drawn with.
        start: makes the state of each block's first step; None = the model's initial one.
        stopping: what ends a row.
        streamer: gets drafts (if it can) and finished blocks of the only row.
    """

    def __init__(
        self,
        model: Any,
        cache: RelayCache,
        options: DecodingOptions,
        *,
        chooser: TokenChooser,
        seeds: Tensor,
        start: RelayStart | None,
        stopping: Stopping,
        streamer: Any,
    ) -> None:
        self.model = model
        self.cache = cache
        self.options = options
        self.chooser = chooser
        self.seeds = seeds
        self.start = start
        self.stopping = stopping
        self.streamer = streamer
        self.mask_token_id: int = model.config.mask_token_id
        self.block_size: int | None = model.config.block_size
        self.token_shift: bool = model.config.token_shift

    def run(self, input_ids: Tensor, attention_mask: Tensor, new_tokens: int) -> RelayGenerateOutput:
        """Decodes `new_tokens` tokens behind every row, or fills its masks if the whole sequence is one block.

        Args:
            input_ids: (B, P) prompts, padded on any side.
            attention_mask: (B, P), 0 at padding.
            new_tokens: appended to every row.

        Raises:
            ValueError: a row is empty, a prompt of a block model holds [MASK], or there is nothing to fill in.
        """
        is_text = attention_mask.bool()
        self._check_prompts(input_ids, is_text, new_tokens)
        self.grid = grid = DecodingGrid(
            input_ids, is_text, new_tokens, self.block_size, self.mask_token_id, self.model.config.positions
        )
        self.appends = new_tokens > 0
        self.denoise_forwards, self.commit_forwards, self.prefill_forwards, self.reference_forwards = torch.zeros(
            4, len(input_ids), dtype=torch.long, device=input_ids.device
        )
        self.recorder = RevealRecorder(grid.tokens) if self.options.output_history else None
        self.passes = ForwardPasses(
            self.model,
            self.cache,
            grid,
            use_relay=self.options.use_relay,
            keeps_block=bool(self.options.use_sub_block_cache),
        )
        # Sub-blocks of text that is appended to a canvas begin with it.
        is_canvas = self.block_size is None and self.appends and self.options.sub_block_size is not None
        grid.anchor = grid.prompt_end if is_canvas else torch.zeros_like(grid.prompt_end)

        begin, final_column = grid.prefix, grid.tokens.shape[1]
        if (known := self._reuse_committed()) < begin:
            self.passes.commit(known, begin)
            self.prefill_forwards += grid.starts > known
        if begin > 0:
            self._reveal_first(begin)
        while True:
            stop = begin + grid.width
            self._denoise(begin, stop)
            self._stop_by_criteria(begin, stop)
            self._stream(begin, stop)
            if (alive := grid.retire(stop)) is not None and len(alive):
                self.cache.batch_select_indices(alive)
            if stop == final_column or len(grid.rows) == 0:
                break
            if self.options.fuse_commits:
                self.passes.commit_later(begin, stop)
            else:
                self.passes.commit(begin, stop)
                self.commit_forwards[grid.rows] += 1
                self._reveal_first(stop)
            begin = stop
        if self.streamer is not None:
            self.streamer.end()
        return self._collect()

    def _check_prompts(self, input_ids: Tensor, is_text: Tensor, new_tokens: int) -> None:
        if not bool(is_text.any(-1).all()):
            raise ValueError("A prompt is empty: give every row at least one token.")
        holds_masks = bool(((input_ids == self.mask_token_id) & is_text).any())
        if self.block_size is not None and holds_masks:
            raise ValueError(
                "The prompt holds [MASK] tokens, which a block model would read as text: only models with "
                "`block_size=None` fill in a canvas."
            )
        if self.block_size is None and new_tokens == 0 and not holds_masks:
            raise ValueError("The canvas has no [MASK] to fill in: put masks into it, or set `max_new_tokens`.")

    # -- committed blocks -------------------------------------------------------------------------------------------

    def _reuse_committed(self) -> int:
        """How many columns of the grid the cache holds already; what it holds beyond the common text is dropped."""
        cached = self.cache.get_seq_length()
        if cached == 0:
            return 0
        width, length = self.grid.width, min(cached, self.grid.prefix)
        is_same = self.cache.tokens[0, :length] == self.grid.tokens[0, :length]
        shared = int(is_same.long().cumprod(0).sum()) // width * width
        if shared < cached:
            if self.token_shift:
                # The next block is aligned with the hidden state before it, which only a commit tells.
                shared = max(shared - width, 0)
            self.cache.crop(shared - cached)
        return shared

    def _reveal_first(self, column: int) -> None:
        """A token-shift model has already scored the first position of a block: at the end of the block before."""
        grid = self.grid
        is_masked = grid.tokens[:, column] == self.mask_token_id
        if not (self.token_shift and bool(is_masked.any())):
            return
        everywhere = torch.arange(len(grid.rows), device=is_masked.device)
        choice = self._choose(self.cache.last_hidden[:, 0], everywhere, column, torch.ones_like(grid.rows))
        grid.tokens[:, column] = torch.where(is_masked, choice.tokens, grid.tokens[:, column])
        if self.recorder is not None:
            first = slice(column, column + 1)
            self.recorder.record(grid.rows, first, is_masked[:, None], choice.confidence[:, None])

    # -- one block --------------------------------------------------------------------------------------------------

    def _denoise(self, begin: int, stop: int) -> None:
        """Reveals the block's positions step by step; ends rows that reach a stop token.

        Every step reveals at least one position of every row that takes part, or brings it nearer to the end of its
        policy's schedule; and at least one row takes part.
        """
        columns = slice(begin, stop)
        self.passes.begin_block(columns)
        self.masks_at_begin = self._masked(columns).sum(-1).clamp(min=1)  # (B,)
        nowhere = torch.full_like(self.grid.rows, torch.iinfo(torch.long).min)
        self.refreshed = nowhere  # (B,) sub-block at whose start all keys were computed
        self.sub_block = nowhere  # (B,) the one that the steps so far were about
        self.progress = Progress(torch.zeros_like(nowhere), torch.zeros_like(nowhere))
        while (step := self._next_step(columns)) is not None:
            if self.start is not None and self.passes.is_block_new:
                self.start(self.passes, step.drafts[0], step.masked)
                self.denoise_forwards[self.grid.rows] += step.active * self.start.denoise_forwards
                self.reference_forwards[self.grid.rows] += step.active * self.start.reference_forwards
            hidden = [self.passes.denoise(draft) for draft in step.drafts]
            self._reveal(step, columns, torch.cat(hidden))
        self.grid.end = torch.minimum(self.grid.end, self._first_stop_token(columns) + 1)

    def _next_step(self, columns: slice) -> Step | None:
        """Which positions to score next, or None if the block is known; the one place where a step waits for the
        device."""
        grid, size = self.grid, self.options.sub_block_size or self.grid.width
        block = grid.tokens[:, columns]
        masked = self._masked(columns)
        column = torch.arange(columns.start, columns.stop, device=block.device)  # (S,)
        # Masks behind the row's end or its stop token are never worth a forward.
        needed = masked & (column < torch.minimum(grid.end, self._first_stop_token(columns))[:, None])
        active = needed.any(-1)
        sub_blocks = sub_blocks_of(len(column), size, grid.anchor - columns.start)  # (B, S)
        candidates = masked & in_earliest_sub_block(needed, sub_blocks) & active[:, None]
        sub_block = sub_blocks.gather(1, needed.long().argmax(-1, keepdim=True))[:, 0]  # (B,)
        progress = self._advance(active, sub_block, candidates.sum(-1))
        certain = torch.zeros_like(candidates)
        drafts: list[tuple[Tensor, Tensor | None]] = [(active, None)]
        if self.token_shift and self.passes.is_commit_due:
            # The block's first token is the commit's, not the policy's.
            certain[:, 0] = candidates[:, 0]
        begins = grid.anchor - columns.start + sub_block * size  # (B,) of the sub-block; negative if it is cut off
        if self.options.use_sub_block_cache:
            # A sub-block alone cannot score its own first position if that is done at the position before.
            is_first = torch.arange(len(column), device=block.device) == begins.clamp(min=0)[:, None]
            is_first_masked = (candidates & is_first).any(-1) & self.token_shift
            is_stale = active & ((self.refreshed != sub_block) | is_first_masked)
            self.refreshed = torch.where(is_stale, sub_block, self.refreshed)
            drafts = [(is_stale, None), (active & ~is_stale, begins)]
            if self.block_size is None:
                # As Fast-dLLM does with Dream: that forward reveals what the following ones cannot, and nothing else.
                candidates = candidates & (is_first | ~is_first_masked[:, None])
                certain = candidates & is_first_masked[:, None]
        counts = [n for rows, _ in drafts for n in (rows.sum(), (candidates & rows[:, None]).sum())]
        numbers = torch.stack([*counts, begins.where(active, len(column)).amin()]).tolist()
        if not any(numbers[:-1]):
            return None
        length = size if self.options.use_sub_block_cache != "prefix" else len(column) - numbers[-1]
        return Step(
            block,
            masked,
            candidates,
            certain,
            active,
            progress,
            [
                self._draft(candidates, rows, takers, count, begins, length)
                for (rows, begins), takers, count in zip(drafts, numbers[::2], numbers[1::2], strict=False)
                if count
            ],
        )

    def _advance(self, active: Tensor, sub_block: Tensor, masks: Tensor) -> Progress:
        """Counts each row's steps within its sub-block: (B,) bool and long, `masks` being what is hidden of that.

        The steps are for all positions of a block model's sub-block, as SDAR counts them, prompt or not; on a canvas
        for those that were hidden at its first step.
        """
        is_new = active & (sub_block != self.sub_block)
        step, positions = self.progress
        total = (
            masks if self.block_size is None else torch.full_like(masks, self.options.sub_block_size or self.grid.width)
        )
        before = Progress(step.where(~is_new, 0), positions.where(~is_new, total))
        self.sub_block = sub_block.where(active, self.sub_block)
        self.progress = Progress(before.step + active, before.positions)
        return before

    def _draft(
        self, candidates: Tensor, active: Tensor, takers: int, count: int, begins: Tensor | None, length: int
    ) -> Draft:
        """The forward about `takers` of the rows, which scores `count` positions."""
        rows, places = torch.nonzero_static(candidates & active[:, None], size=count).unbind(-1)
        taking_part = None if takers == len(active) else torch.nonzero_static(active, size=takers)[:, 0]
        return Draft(active, taking_part, rows, places, begins, length)

    def _masked(self, columns: slice) -> Tensor:
        """(B, S) bool, what is still hidden of each row's own positions."""
        return (self.grid.tokens[:, columns] == self.mask_token_id) & self.grid.visible[:, columns]

    def _first_stop_token(self, columns: slice) -> Tensor:
        """(B,) column of the first stop token among the new tokens of the block, or one that is never reached."""
        grid, never = self.grid, self.grid.tokens.shape[1]
        if self.stopping.token_ids is None:
            return torch.full_like(grid.end, never)
        column = torch.arange(columns.start, columns.stop, device=grid.tokens.device)
        is_stop = torch.isin(grid.tokens[:, columns], self.stopping.token_ids) & (column >= grid.prompt_end[:, None])
        return torch.where(is_stop, column, never).amin(-1)

    def _choose(self, hidden: Tensor, rows: Tensor, columns: Tensor | int, share_left: Tensor) -> Choice:
        """Scores N positions, and chooses their tokens.

        Args:
            hidden: (N, D) inputs of the head.
            rows: (N,).
            columns: (N,) or one for all.
            share_left: (B,) share of each row's block that is still masked.
        """
        grid = self.grid
        if not self.chooser.needs_logits:
            confidence, tokens = self.model.best_tokens(hidden)
            return Choice(self._known(tokens), confidence, confidence)
        numbers = uniform_numbers(
            self.seeds[grid.rows[rows]], self.denoise_forwards[grid.rows[rows]], columns - grid.offset[rows]
        )
        choice = self.chooser(self.model.lm_head(hidden), grid.tokens[rows], share_left[rows][:, None], numbers)
        return choice._replace(tokens=self._known(choice.tokens))

    def _known(self, tokens: Tensor) -> Tensor:
        """Where no token is possible at all (or no score a number), [MASK] may come first: any other one ends it."""
        return tokens.where(tokens != self.mask_token_id, 1 if self.mask_token_id == 0 else 0)

    def _reveal(self, step: Step, columns: slice, hidden: Tensor) -> None:
        """Writes what the policy reveals.

        Args:
            step: what was scored.
            columns: of the block.
            hidden: (N, D) inputs of the head.
        """
        grid, block = self.grid, step.block
        self.denoise_forwards[grid.rows] += step.active
        rows = torch.cat([draft.rows for draft in step.drafts])
        places = torch.cat([draft.places for draft in step.drafts])
        share_left = step.masked.sum(-1) / self.masks_at_begin
        choice = self._choose(hidden, rows, columns.start + places, share_left)
        where = (rows, places)
        nothing = torch.zeros(block.shape, device=block.device)
        confidence = nothing.index_put(where, choice.confidence)
        measure = nothing.index_put(where, choice.measure)
        revealed = self.options.policy(measure, step.candidates & ~step.certain, step.progress) | step.certain
        grid.tokens[:, columns] = torch.where(revealed, block.index_put(where, choice.tokens), block)
        if self.recorder is not None:
            self.recorder.record(grid.rows, columns, revealed, confidence, self.denoise_forwards[grid.rows])
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(self._shown(columns.start, columns.stop))

    # -- what is seen of a row --------------------------------------------------------------------------------------

    def _stop_by_criteria(self, begin: int, stop: int) -> None:
        """Ends rows by criteria: those that read text, and clocks, which leave rows what is known by then."""
        clocks = [criterion for criterion in self.stopping.criteria if isinstance(criterion, MaxTimeCriteria)]
        readers = [criterion for criterion in self.stopping.criteria if not isinstance(criterion, MaxTimeCriteria)]
        if readers:
            self._stop_by_text(begin, stop, readers)
        if any(bool(clock(self.grid.tokens, None).any()) for clock in clocks):
            self.grid.end = self.grid.end.clamp(max=stop)

    def _stop_by_text(self, begin: int, stop: int, readers: list[Callable[..., Tensor]]) -> None:
        """Asks about every prefix, because a block brings many tokens at once.

        Criteria see what token-by-token decoding would show them: the batch as it was given, with as many new tokens
        behind every prompt. Rows that have ended are padded; those that are not as far yet show [MASK]s, and are not
        asked about.
        """
        grid = self.grid
        first = (begin - grid.prompt_end).clamp(min=0)  # (B,) new tokens known before this block
        known = grid.end.clamp(max=stop) - grid.prompt_end  # (B,) and with it
        grid.file(stop)
        behind = torch.full_like(grid.all_end, self.stopping.padding)
        behind[grid.rows] = behind[grid.rows].where(grid.end <= stop, self.mask_token_id)
        texts, width = grid.as_given(grid.all_tokens, grid.prompts, behind[:, None]), grid.prompts.shape[1]
        for count in range(int(first.min()) + 1, int(known.max()) + 1):
            verdicts = [criterion(texts[:, : width + count], None) for criterion in readers]
            stops = torch.stack([torch.as_tensor(v, device=texts.device).expand(len(texts)) for v in verdicts]).any(0)
            ends = (first < count) & (count <= known) & stops[grid.rows]
            known = known.where(~ends, count)
            grid.end = grid.end.where(~ends, grid.prompt_end + count)

    def _stream(self, begin: int, stop: int) -> None:
        if self.streamer is not None and len(shown := self._shown(begin, stop)):
            self.streamer.put(shown)

    def _shown(self, begin: int, stop: int) -> Tensor:
        """What a streamer gets of a block of the only row: its new tokens, or all of it if nothing is appended."""
        first = max(begin, int(self.grid.prompt_end[0])) if self.appends else begin
        return self.grid.tokens[0, first : min(stop, int(self.grid.end[0]))].cpu()

    def _collect(self) -> RelayGenerateOutput:
        grid = self.grid
        counts = grid.all_end - grid.all_prompt_end  # (B,)
        filled = ((grid.prompts == self.mask_token_id) & grid.is_text).sum(-1)
        forwards = self.denoise_forwards + self.commit_forwards + self.prefill_forwards
        return RelayGenerateOutput(
            sequences=grid.as_given(grid.all_tokens, grid.prompts, self.stopping.padding),
            denoise_forwards=self.denoise_forwards,
            commit_forwards=self.commit_forwards,
            prefill_forwards=self.prefill_forwards,
            tokens_per_forward=(counts + filled) / forwards.clamp(min=1),
            reference_forwards=self.reference_forwards if self.start and self.start.reference_forwards else None,
            cache=self.cache,
            history=None if self.recorder is None else self._collect_history(self.recorder),
        )

    def _collect_history(self, recorder: RevealRecorder) -> RelayGenerateHistory:
        grid, prompts = self.grid, self.grid.prompts
        revealed_at = grid.as_given(recorder.revealed_at, torch.full_like(prompts, -1), -1)
        no_confidence = torch.zeros_like(prompts, dtype=torch.float32)
        given = torch.zeros_like(revealed_at, dtype=torch.bool)
        given[:, : prompts.shape[1]] = grid.is_text & (prompts != self.mask_token_id)
        return RelayGenerateHistory(
            revealed_at=revealed_at,
            confidence=grid.as_given(recorder.confidence, no_confidence, 0.0),
            given=given,
            denoise_forwards=self.denoise_forwards,
        )
