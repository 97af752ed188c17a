"""The rows of one `generate` as the caller gave them: the layout of its prompts, and where texts and counts of rows go.

A decoder may hold rows of several calls, in a grid whose columns move. What belongs to one call is kept here, in the
columns that its own grid had.

Legend: B rows of the call, n of them that are still decoded, P columns of the prompts as they were given, W columns of
the grid.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .outputs_relay import RelayGenerateHistory, RelayGenerateOutput


@dataclass
class Prompts:
    """The prompts of a batch, and what the host has to know of them.

    Args:
        ids: (B, P) prompts, padded on any side.
        is_text: (B, P) bool, False at padding.
        lengths: tokens of each row.
        masks: how many of them are [MASK].
    """

    ids: Tensor
    is_text: Tensor
    lengths: list[int]
    masks: list[int]

    @classmethod
    def read(cls, input_ids: Tensor, attention_mask: Tensor | None, mask_token_id: int) -> "Prompts":
        """Reads prompts where they are; on a device, waits for it once."""
        ids = input_ids.long()
        is_text = torch.ones_like(ids) if attention_mask is None else attention_mask.to(ids.device)
        is_text = is_text.bool()
        numbers = torch.stack([is_text.sum(-1), ((ids == mask_token_id) & is_text).sum(-1)])
        return cls(ids, is_text, *numbers.tolist())

    def check(self, new_tokens: int, block_size: int | None) -> None:
        """Raise a ValueError if a row cannot be decoded; arguments of `DecodingGrid`."""
        if not all(self.lengths):
            raise ValueError("A prompt is empty: give every row at least one token.")
        holds_masks = any(self.masks)
        if block_size is not None and holds_masks:
            raise ValueError("The prompt holds [MASK] tokens: only models with `block_size=None` fill in a canvas.")
        if block_size is None and new_tokens == 0 and not holds_masks:
            raise ValueError("The canvas has no [MASK] to fill in: put masks into it, or set `max_new_tokens`.")


class GivenBatch:
    """The rows of one `generate`.

    Args:
        prompts: the prompts.
        stopping: ends the rows, a `Stopping`.
        streamer: receives the finished blocks of the only row, and drafts if it has a method `put_draft`; or None.
        records_history: keep when each token was revealed.
        mask_token_id: id of [MASK].
        device: the model's.

    Attributes:
        rows: (n,) indices in the batch of the rows that are still decoded.
        count: n, on the host.
        shift: columns by which the rows are further right in the decoder's grid than in this batch.
        most_new: the most new tokens of the rows that have ended.
        forwards: (4, B) denoise, commit, prefill and reference forwards of rows, once they are saved.
        recorder: keeps when each token was revealed, if that is asked for; from `place` on.
        tokens: (B, W) texts of rows as far as they are saved, from `place` on.
        prompt_end, end: (B,) columns of the first new token and behind the last one, likewise.
    """

    def __init__(
        self,
        prompts: Prompts,
        stopping: Any,
        streamer: Any,
        records_history: bool,
        mask_token_id: int,
        device: torch.device,
    ) -> None:
        self.prompts = replace(prompts, ids=prompts.ids.to(device), is_text=prompts.is_text.to(device))
        self.stopping = stopping
        self.streamer = streamer
        self.records_history = records_history
        self.mask_token_id = mask_token_id
        self.count, self.shift, self.most_new = len(prompts.lengths), 0, 0
        self.rows = torch.arange(self.count, device=device)
        self.forwards = torch.zeros(4, self.count, dtype=torch.long, device=device)
        self.recorder: RevealRecorder | None = None
        self._text = torch.nonzero_static(self.prompts.is_text, size=sum(prompts.lengths)).unbind(-1)
        self._columns: Any = None
        self.tokens: Any = None
        self.prompt_end: Any = None
        self.end: Any = None

    @property
    def shows_drafts(self) -> bool:
        """Whether the streamer is shown every step."""
        return hasattr(self.streamer, "put_draft")

    def place(self, offset: Tensor, prompt_end: Tensor, end: Tensor, columns: int) -> Tensor:
        """Lines the prompts up in a grid; all columns (B,).

        Args:
            offset: column of each row's position 0.
            prompt_end: column of its first new token.
            end: column behind its last token.
            columns: W.

        Returns:
            (B, W) tokens, [MASK] behind the prompts.
        """
        places = self.prompts.is_text.long().cumsum(-1) - 1 + offset[:, None]  # (B, P)
        self._columns = (self._text[0], places[self._text])
        self.tokens = torch.full((self.count, columns), self.mask_token_id, device=offset.device)
        self.tokens[self._columns] = self.prompts.ids[self._text]
        self.prompt_end, self.end = prompt_end.clone(), end.clone()
        self.recorder = RevealRecorder(self.tokens) if self.records_history else None
        return self.tokens.clone()

    def columns(self, columns: slice) -> slice:
        """Columns of the decoder's grid, counted as in this batch."""
        return slice(columns.start - self.shift, columns.stop - self.shift)

    def save(self, tokens: Tensor, end: Tensor, forwards: Tensor) -> None:
        """Takes over the rows that are still decoded, from the columns of the decoder's grid.

        Args:
            tokens: (n, columns of that grid).
            end: (n,) columns of that grid.
            forwards: (4, n).
        """
        begin, stop = max(0, -self.shift), min(self.tokens.shape[1], tokens.shape[1] - self.shift)
        self.tokens[self.rows, begin:stop] = tokens[:, begin + self.shift : stop + self.shift]
        self.end[self.rows] = end - self.shift
        self.forwards[:, self.rows] = forwards

    def keep(self, rows: Tensor, count: int) -> None:
        """Drops all rows but those with these indices, (n,), among the rows that are still decoded."""
        self.rows, self.count = self.rows[rows], count

    def as_given(self, grid: Tensor, padding: Tensor, behind: float | Tensor, new_tokens: int) -> Tensor:
        """Undoes the alignment: values in the caller's padded layout, new tokens behind the prompts.

        Args:
            grid: (B, W), one value for every column.
            padding: (B, P) values for the padding of the prompts.
            behind: value behind a row's saved tokens; one for all, or (B, 1).
            new_tokens: number of columns behind the prompts.

        Returns:
            (B, P + `new_tokens`).
        """
        prompts = padding.index_put(self._text, grid[self._columns])
        counts = self.end - self.prompt_end  # (B,)
        step = torch.arange(new_tokens, device=counts.device)
        columns = (self.prompt_end[:, None] + step).clamp(max=grid.shape[1] - 1)
        new = grid.gather(-1, columns).where(step < counts[:, None], behind)
        return torch.cat([prompts, new], dim=-1)

    def output(self, cache: Any, counts_reference: bool) -> RelayGenerateOutput:
        """What `generate` returns, once all rows have ended; without counts of a reference model, if there is none."""
        denoise, commit, prefill, reference = self.forwards
        filled = ((self.prompts.ids == self.mask_token_id) & self.prompts.is_text).sum(-1)
        forwards = denoise + commit + prefill
        return RelayGenerateOutput(
            sequences=self.as_given(self.tokens, self.prompts.ids, self.stopping.padding, self.most_new),
            denoise_forwards=denoise,
            commit_forwards=commit,
            prefill_forwards=prefill,
            tokens_per_forward=(self.end - self.prompt_end + filled) / forwards.clamp(min=1),
            reference_forwards=reference if counts_reference else None,
            cache=cache,
            history=None if self.recorder is None else self.recorder.history(self, denoise),
        )


class RevealRecorder:
    """Two numbers for every column of a batch, kept for all rows whether they are still decoded or not.

    Args:
        tokens: (B, W) texts of the whole batch, of which only shape and device matter.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.revealed_at = torch.zeros_like(tokens, dtype=torch.long)  # (B, W)
        self.confidence = torch.zeros_like(tokens, dtype=torch.float32)  # (B, W)

    def record(
        self, rows: Tensor, columns: slice, revealed: Tensor, confidence: Tensor, forward: Tensor | None = None
    ) -> None:
        """Notes the reveals of one step.

        Args:
            rows: (n,) indices in the batch of the rows that are still decoded.
            columns: the S columns of the step's block.
            revealed: (n, S) bool, positions that the step revealed.
            confidence: (n, S) fp32 probability of those tokens.
            forward: (n,) number of each row's own denoise forward; None for a prefill or commit, noted as 0.
        """
        at = torch.zeros_like(rows) if forward is None else forward
        self.revealed_at[rows, columns] = torch.where(revealed, at[:, None], self.revealed_at[rows, columns])
        self.confidence[rows, columns] = torch.where(revealed, confidence, self.confidence[rows, columns])

    def record_block(self, rows: Tensor, columns: slice, revealed_at: Tensor, confidence: Tensor) -> None:
        """Notes what all steps of a block revealed, as `record` does; `revealed_at`: (n, S), 0 where none did."""
        at = self.revealed_at[rows, columns]
        self.confidence[rows, columns] = confidence.where(revealed_at > 0, self.confidence[rows, columns])
        self.revealed_at[rows, columns] = revealed_at.where(revealed_at > 0, at)

    def history(self, batch: GivenBatch, denoise_forwards: Tensor) -> RelayGenerateHistory:
        """The recorded numbers in the layout of the caller's prompts; `denoise_forwards`: (B,), one count per row."""
        prompts = batch.prompts.ids
        revealed_at = batch.as_given(self.revealed_at, torch.full_like(prompts, -1), -1, batch.most_new)
        no_confidence = torch.zeros_like(prompts, dtype=torch.float32)
        given = torch.zeros_like(revealed_at, dtype=torch.bool)
        given[:, : prompts.shape[1]] = batch.prompts.is_text & (prompts != batch.mask_token_id)
        return RelayGenerateHistory(
            revealed_at=revealed_at,
            confidence=batch.as_given(self.confidence, no_confidence, 0.0, batch.most_new),
            given=given,
            denoise_forwards=denoise_forwards,
        )
