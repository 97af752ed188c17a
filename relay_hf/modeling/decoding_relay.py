"""The block decoder: prefill, then per block denoise until it is known and commit it; rows leave as they finish.

Layout. Rows of different prompt lengths are decoded side by side, each from the block that its own prompt ends in. The
grid of tokens is therefore aligned on that block border: row r is shifted right by `offset[r]` columns, so that column
c holds its position c - offset[r], and all rows commit the same columns at the same time. What a row computes depends
on its own positions only, so a batch gives what its rows give alone.

Legend: B rows still being decoded, W columns of the grid, S positions of a block, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cache_relay import RelayCache
from .history_relay import RevealRecorder
from .outputs_relay import RelayGenerateHistory, RelayGenerateOutput
from .reveal_relay import UnmaskingPolicy, best_token, in_earliest_sub_block


class TokenChooser:
    """Picks a token for every scored position, and says how probable it was.

    Args:
        processors: standard logits processors and warpers whose effect does not depend on the order of tokens.
        do_sample: draw from the distribution instead of taking its mode.
        mask_token_id: never chosen.
    """

    def __init__(self, processors: Callable[..., Tensor], do_sample: bool, mask_token_id: int) -> None:
        self.processors = processors
        self.do_sample = do_sample
        self.mask_token_id = mask_token_id
        self.needs_logits = do_sample or bool(processors)  # a list of none is false

    def __call__(self, logits: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(N, V) logits and (N, W) rows they belong to -> (N,) fp32 probability and (N,) token."""
        if not self.do_sample:
            return best_token(self.processors(context, logits), self.mask_token_id)
        # Before the warpers, which could keep [MASK] only; and after them, because a custom one may bring it back.
        logits[:, self.mask_token_id] = -torch.inf
        scores = self.processors(context, logits).float()
        scores[:, self.mask_token_id] = -torch.inf
        probabilities = scores.softmax(-1)
        token = torch.multinomial(probabilities, num_samples=1)
        return probabilities.gather(-1, token)[:, 0], token[:, 0]


class BlockDecoder:
    """Decodes one batch; made anew by every `generate`.

    Args:
        model: called as `model(input_ids, ...)`, plus its head and its initial relay state.
        cache: an empty cache, filled while decoding.
        policy: which masked positions to reveal.
        chooser: which token to reveal there.
        sub_block_size: positions of a block revealed before the next ones are looked at; None = all.
        use_relay: carry the state between denoising steps.
        stop_token_ids: (n,) tokens that end a row, or None.
        pad_token_id: scalar written behind a row's end, or None (0 is written).
        stopping_criteria: further criteria, asked about every prefix of a row when its block is complete.
        streamer: gets drafts (if it can) and finished blocks of the only row.
        output_history: note which forward reveals which token.
    """

    def __init__(
        self,
        model: Any,
        cache: RelayCache,
        *,
        policy: UnmaskingPolicy,
        chooser: TokenChooser,
        sub_block_size: int | None,
        use_relay: bool,
        stop_token_ids: Tensor | None,
        pad_token_id: Tensor | None,
        stopping_criteria: list[Callable[..., Tensor]],
        streamer: Any,
        output_history: bool,
    ) -> None:
        self.model = model
        self.cache = cache
        self.policy = policy
        self.chooser = chooser
        self.sub_block_size = sub_block_size
        self.use_relay = use_relay
        self.stop_token_ids = stop_token_ids
        self.pad_token_id = 0 if pad_token_id is None else int(pad_token_id)
        self.stopping_criteria = stopping_criteria
        self.streamer = streamer
        self.output_history = output_history
        self.mask_token_id: int = model.config.mask_token_id
        self.block_size: int | None = model.config.block_size

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
        self._lay_out(input_ids, is_text, new_tokens)
        begin, final_column = self.prefix, self.tokens.shape[1]
        if begin > 0:
            self._commit(0, begin, self.prefill_forwards)
            self._reveal_first(begin)
        while True:
            stop = begin + self.width
            self._denoise(begin, stop)
            self._stop_by_criteria(begin, stop)
            self._stream(begin, stop)
            self._retire(stop)
            if stop == final_column or len(self.rows) == 0:
                break
            self._commit(begin, stop, self.commit_forwards)
            self._reveal_first(stop)
            begin = stop
        if self.streamer is not None:
            self.streamer.end()
        return self._collect(input_ids, is_text)

    # -- layout ---------------------------------------------------------------------------------------------------

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

    def _lay_out(self, input_ids: Tensor, is_text: Tensor, new_tokens: int) -> None:
        lengths = is_text.sum(-1)  # (B,)
        ends = lengths + new_tokens  # (B,)
        if self.block_size is None:
            starts, self.width = torch.zeros_like(lengths), int(ends.max())
        else:
            starts, self.width = lengths // self.block_size * self.block_size, self.block_size
        self.prefix = int(starts.max())
        blocks = int(((ends - starts + self.width - 1) // self.width).max())

        # Live rows: `_retire` keeps these in step.
        device = input_ids.device
        column = torch.arange(self.prefix + blocks * self.width, device=device)
        self.rows = torch.arange(len(lengths), device=device)  # (B,) where the row stood in the batch
        self.offset = self.prefix - starts  # (B,)
        self.prompt_end = self.offset + lengths  # (B,) column of the first new token
        self.end = self.offset + ends  # (B,) column behind the last token; moves left when the row stops
        self.visible = column >= self.offset[:, None]  # (B, W)
        if self.block_size is None:
            self.visible &= column < self.end[:, None]
        self.is_padded = not bool(self.visible.all())
        self.tokens = torch.full((len(lengths), len(column)), self.mask_token_id, device=device)  # (B, W)
        positions = is_text.long().cumsum(-1) - 1  # (B, P)
        self._prompt_columns = (positions + self.offset[:, None])[is_text]
        self.tokens[is_text.nonzero()[:, 0], self._prompt_columns] = input_ids[is_text]

        # All rows, as they were given.
        self.all_prompt_end, self.all_end, self.all_tokens = self.prompt_end, self.end.clone(), self.tokens.clone()
        self.has_prefix = starts > 0
        self.appends = new_tokens > 0
        self.denoise_forwards, self.commit_forwards, self.prefill_forwards = torch.zeros(
            3, len(lengths), dtype=torch.long, device=device
        )
        self.recorder = RevealRecorder(self.tokens) if self.output_history else None

    def _attention_mask(self, stop: int) -> Tensor | None:
        return self.visible[:, :stop] if self.is_padded else None

    # -- one block --------------------------------------------------------------------------------------------------

    def _commit(self, begin: int, stop: int, counter: Tensor) -> None:
        """Writes known columns to the cache, without any relay state."""
        self.model(
            self.tokens[:, begin:stop],
            attention_mask=self._attention_mask(stop),
            past_key_values=self.cache,
            logits_to_keep=self.rows.new_empty(0),
        )
        counter[self.rows] += self.has_prefix[self.rows] if counter is self.prefill_forwards else 1

    def _reveal_first(self, column: int) -> None:
        """A token-shift model has already scored the first position of a block: at the end of the block before."""
        is_masked = self.tokens[:, column] == self.mask_token_id
        if self.model.config.token_shift and bool(is_masked.any()):
            hidden = self.cache.last_hidden[:, 0]
            if self.chooser.needs_logits:
                probability, token = self.chooser(self.model.lm_head(hidden), self.tokens)
            else:
                probability, token = self.model.best_tokens(hidden)
            self.tokens[:, column] = torch.where(is_masked, token, self.tokens[:, column])
            if self.recorder is not None:
                self.recorder.record(self.rows, slice(column, column + 1), is_masked[:, None], probability[:, None])

    def _denoise(self, begin: int, stop: int) -> None:
        """Reveals the block's positions step by step; ends rows that reach a stop token.

        Every step reveals at least one position of every row that takes part, so there are at most S steps.
        """
        columns = slice(begin, stop)
        column = torch.arange(begin, stop, device=self.tokens.device)  # (S,)
        while True:
            block = self.tokens[:, columns]  # (B, S)
            masked = (block == self.mask_token_id) & self.visible[:, columns]
            stops_at = self._first_stop_token(block, column)  # (B,)
            # Masks behind the row's end or its stop token are never worth a forward.
            needed = masked & (column < torch.minimum(self.end, stops_at)[:, None])
            active = needed.any(-1)  # (B,)
            if not bool(active.any()):
                break
            candidates = masked & in_earliest_sub_block(needed, self.sub_block_size or self.width) & active[:, None]
            self._denoise_once(columns, block, candidates, active)
        self.end = torch.minimum(self.end, stops_at + 1)

    def _denoise_once(self, columns: slice, block: Tensor, candidates: Tensor, active: Tensor) -> None:
        state = None
        if self.use_relay:
            state = self.cache.relay_state
            if state is None:
                state = self.model.initial_relay_state(*block.shape)
        with self.cache.drafting():
            output = self.model(
                block,
                attention_mask=self._attention_mask(columns.stop),
                past_key_values=self.cache,
                relay_state=state,
                logits_to_keep=candidates,
                best_only=not self.chooser.needs_logits,
            )
        if self.use_relay:
            self.cache.write_relay_state(output.relay_state, active)
        self.denoise_forwards[self.rows] += active

        probability, token = output.confidence, output.best_tokens
        if self.chooser.needs_logits:
            probability, token = self.chooser(output.logits, self.tokens[candidates.nonzero()[:, 0]])
        confidence = torch.zeros(block.shape, device=block.device).masked_scatter(candidates, probability)
        proposal = block.masked_scatter(candidates, token)
        revealed = self.policy(confidence, candidates)
        self.tokens[:, columns] = torch.where(revealed, proposal, block)
        if self.recorder is not None:
            self.recorder.record(self.rows, columns, revealed, confidence, self.denoise_forwards[self.rows])
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(self._shown(columns.start, columns.stop))

    def _first_stop_token(self, block: Tensor, column: Tensor) -> Tensor:
        """(B,) column of the first stop token among the new tokens of the block, or one that is never reached."""
        never = self.tokens.shape[1]
        if self.stop_token_ids is None:
            return torch.full_like(self.end, never)
        is_stop = torch.isin(block, self.stop_token_ids) & (column >= self.prompt_end[:, None])
        return torch.where(is_stop, column, never).amin(-1)

    # -- rows that end ----------------------------------------------------------------------------------------------

    def _stop_by_criteria(self, begin: int, stop: int) -> None:
        """Asks criteria that read text about every prefix, because a block brings many tokens at once."""
        if not self.stopping_criteria:
            return
        for row, (offset, first, end) in enumerate(
            zip(self.offset.tolist(), self.prompt_end.tolist(), self.end.tolist(), strict=True)
        ):
            for last in range(max(begin, first), min(stop, end)):
                prefix = self.tokens[row : row + 1, offset : last + 1]
                if any(bool(torch.as_tensor(criterion(prefix, None)).any()) for criterion in self.stopping_criteria):
                    self.end[row] = last + 1
                    break

    def _stream(self, begin: int, stop: int) -> None:
        if self.streamer is not None and len(shown := self._shown(begin, stop)):
            self.streamer.put(shown)

    def _shown(self, begin: int, stop: int) -> Tensor:
        """What a streamer gets of a block of the only row: its new tokens, or all of it if nothing is appended."""
        first = max(begin, int(self.prompt_end[0])) if self.appends else begin
        return self.tokens[0, first : min(stop, int(self.end[0]))].cpu()

    def _retire(self, stop: int) -> None:
        """Files the rows that end before column `stop`; they leave together with their keys, values and state."""
        done = self.end <= stop
        if not bool(done.any()):
            return
        self.all_tokens[self.rows[done]], self.all_end[self.rows[done]] = self.tokens[done], self.end[done]
        alive = (~done).nonzero()[:, 0]
        for name in ("rows", "tokens", "offset", "prompt_end", "end", "visible"):
            setattr(self, name, getattr(self, name)[alive])
        if len(alive):
            self.cache.batch_select_indices(alive)

    def _collect(self, input_ids: Tensor, is_text: Tensor) -> RelayGenerateOutput:
        counts = self.all_end - self.all_prompt_end  # (B,)
        filled = ((input_ids == self.mask_token_id) & is_text).sum(-1)
        forwards = self.denoise_forwards + self.commit_forwards + self.prefill_forwards
        return RelayGenerateOutput(
            sequences=self._align(self.all_tokens, is_text, input_ids, self.pad_token_id),
            denoise_forwards=self.denoise_forwards,
            commit_forwards=self.commit_forwards,
            prefill_forwards=self.prefill_forwards,
            tokens_per_forward=(counts + filled) / forwards.clamp(min=1),
            past_key_values=self.cache,
            history=None if self.recorder is None else self._collect_history(self.recorder, input_ids, is_text),
        )

    def _collect_history(self, recorder: RevealRecorder, input_ids: Tensor, is_text: Tensor) -> RelayGenerateHistory:
        revealed_at = self._align(recorder.revealed_at, is_text, torch.full_like(input_ids, -1), -1)
        no_confidence = torch.zeros_like(input_ids, dtype=torch.float32)
        given = torch.zeros_like(revealed_at, dtype=torch.bool)
        given[:, : input_ids.shape[1]] = is_text & (input_ids != self.mask_token_id)
        return RelayGenerateHistory(
            revealed_at=revealed_at,
            confidence=self._align(recorder.confidence, is_text, no_confidence, 0.0),
            given=given,
            denoise_forwards=self.denoise_forwards,
        )

    def _align(self, grid: Tensor, is_text: Tensor, padding: Tensor, behind: float) -> Tensor:
        """(B, W) columns of all rows as they were given -> (B, L) in the form of `sequences`.

        Args:
            is_text: (B, P), where the prompts are.
            padding: (B, P), kept where they are not.
            behind: written behind a row's end.
        """
        prompts = padding.masked_scatter(is_text, grid[is_text.nonzero()[:, 0], self._prompt_columns])
        counts = self.all_end - self.all_prompt_end  # (B,)
        step = torch.arange(int(counts.max()), device=counts.device)
        columns = (self.all_prompt_end[:, None] + step).clamp(max=grid.shape[1] - 1)
        new = grid.gather(-1, columns).where(step < counts[:, None], behind)
        return torch.cat([prompts, new], dim=-1)
