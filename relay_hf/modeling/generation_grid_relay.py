"""The rows of a batch, side by side: their tokens, their ends, and when each token was revealed.

Rows of different prompt lengths are decoded together, each from the block that its own prompt ends in. The grid is
therefore aligned on that block border: row r is shifted right by `offset[r]` columns, so that column c holds its
position c - offset[r], and all rows commit the same columns at the same time. What a row computes depends on its own
positions only, so a batch gives what its rows give alone.

Legend: B rows still being decoded, P columns of the prompts as they were given, W columns of the grid, S positions of a
block.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .configuration_relay import RelayConfig
from .generation_candidates_relay import Texts
from .outputs_relay import RelayGenerateHistory


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


class DecodingGrid:
    """Tokens of all rows, with the borders between prompts, new tokens and what fills up the last block.

    Args:
        prompts: the prompts.
        new_tokens: number of tokens to append to every row; 0 = only masks of a canvas are filled.
        config: configuration of the model. The masks that fill up the last block stop at the model's last position.
        sub_block_size: positions of a sub-block, or None; where text is appended to a canvas, sub-blocks begin with it.
        device: the model's.

    Raises:
        ValueError: a row is empty, a prompt of a block model holds [MASK], or there is nothing to fill in.

    Attributes:
        width: S, columns of a block.
        prefix: columns of the blocks before the one that each prompt ends in.
        rows: (B,) indices in the batch of the rows that are still decoded.
        tokens: (B, W) tokens of these rows, [MASK] where none is revealed yet.
        visible: (B, W) bool, columns that hold a position of the row.
        visible_stop: the first column, behind the prompts, that holds no position of some row.
        offset: (B,) column of the row's position 0.
        prompt_end: (B,) column of the first new token.
        end: (B,) column behind the last token; moves left when the row stops.
        prompt_ends, ends: the same numbers on the host, so that nobody has to wait for them.
        anchor: (B,) column from which sub-blocks are counted.
        appends: whether new tokens follow the prompts.
        most_new: the most new tokens of the rows that have ended.
    """

    def __init__(
        self,
        prompts: Prompts,
        new_tokens: int,
        config: RelayConfig,
        sub_block_size: int | None,
        device: torch.device,
    ) -> None:
        block_size, positions = config.block_size, config.positions
        prompts.check(new_tokens, block_size)
        self.appends, self.most_new = new_tokens > 0, 0
        self.mask_token_id: Any = config.mask_token_id
        self.prompts, self.is_text = prompts.ids.to(device), prompts.is_text.to(device)

        # On the host: columns of the grid.
        longest = max(prompts.lengths) + new_tokens
        self.width = longest if block_size is None else block_size
        starts = [0 if block_size is None else length // block_size * block_size for length in prompts.lengths]
        self.prefix = max(starts)
        self.prompt_ends = [self.prefix - start + n for start, n in zip(starts, prompts.lengths, strict=True)]
        self.ends = [prompt_end + new_tokens for prompt_end in self.prompt_ends]
        blocks = max(-(-(end - self.prefix) // self.width) for end in self.ends)
        final = self.prefix + blocks * self.width
        self.last_position = None if positions is None else max(positions, longest) - 1

        # On the device: the same for each row.
        column = torch.arange(final, device=device)
        lengths = self.is_text.sum(-1)  # (B,)
        ends = lengths + new_tokens  # (B,)
        self.starts = torch.zeros_like(lengths) if block_size is None else lengths // block_size * block_size
        self.rows = torch.arange(len(lengths), device=device)
        self.offset = self.prefix - self.starts
        self.prompt_end = self.offset + lengths
        self.end = self.offset + ends
        is_canvas = block_size is None and self.appends and sub_block_size is not None
        self.anchor = self.prompt_end if is_canvas else torch.zeros_like(self.prompt_end)
        self.visible, self.visible_stop = column >= self.offset[:, None], final
        if block_size is None:
            self.visible &= column < self.end[:, None]
            self.visible_stop = min(self.ends)
        elif positions is not None:
            self.visible &= column < (self.offset + ends.clamp(min=positions))[:, None]
            last = [max(end, self.prefix - start + positions) for start, end in zip(starts, self.ends, strict=True)]
            self.visible_stop = min(final, *last)
        self.is_padded = min(starts) < self.prefix or self.visible_stop < final
        self.tokens = torch.full((len(lengths), len(column)), self.mask_token_id, device=device)
        self._text = torch.nonzero_static(self.is_text, size=sum(prompts.lengths)).unbind(-1)
        places = self.is_text.long().cumsum(-1) - 1 + self.offset[:, None]  # (B, P)
        self._columns = (self._text[0], places[self._text])
        self.tokens[self._columns] = self.prompts[self._text]

        # All rows, as they were given.
        self.all_prompt_end, self.all_end, self.all_tokens = self.prompt_end, self.end.clone(), self.tokens.clone()

    def attention_mask(self, stop: int) -> Tensor | None:
        """(B, stop) bool, or None if there is no padding."""
        return self.visible[:, :stop] if self.is_padded else None

    def positions(self, begin: int, stop: int) -> Tensor:
        """Each row's positions in these columns, its first and last at padding: (B, L), or (1, L) without padding."""
        column = torch.arange(begin, stop, device=self.tokens.device)[None]
        return (column - self.offset[:, None]).clamp(0, self.last_position) if self.is_padded else column

    def texts(self, columns: slice) -> Texts:
        """The block in these columns; its tokens are a view."""
        ends = (each - columns.start for each in (self.prompt_end, self.end, self.anchor))
        return Texts(self.tokens[:, columns], self.visible[:, columns], *ends)

    def shown(self, columns: slice) -> Tensor:
        """The tokens of the only row's block that a streamer gets: new ones, or all if nothing is appended."""
        first = max(columns.start, self.prompt_ends[0]) if self.appends else columns.start
        return self.tokens[0, first : min(columns.stop, self.ends[0])].cpu()

    def move_ends(self, end: Tensor, ends: list[int]) -> None:
        """Ends the rows there: (B,) columns, and the same on the host."""
        self.end, self.ends = end, ends

    def save_active_rows(self, stop: int) -> None:
        """Copies tokens and ends of the rows, up to column `stop`, into the arrays of the whole batch."""
        self.all_tokens[self.rows], self.all_end[self.rows] = self.tokens, self.end.clamp(max=stop)

    def retire(self, stop: int) -> Tensor | None:
        """Saves the rows, and drops those that end before column `stop`.

        Returns:
            (n,) indices of the rows that stay, or None if all do.
        """
        self.save_active_rows(stop)
        stays = [row for row, end in enumerate(self.ends) if end > stop]
        if len(stays) == len(self.ends):
            return None
        alive = torch.nonzero_static(self.end > stop, size=len(stays))[:, 0]
        self.keep(alive, stays)
        return alive

    def keep(self, rows: Tensor, on_host: list[int]) -> None:
        """Drops all rows but those with these indices, (n,), and the same on the host; dropped ones have ended."""
        news = [end - prompt_end for end, prompt_end in zip(self.ends, self.prompt_ends, strict=True)]
        dropped = set(range(len(news))) - set(on_host)
        self.most_new = max([self.most_new, *(news[row] for row in dropped)])
        self.ends, self.prompt_ends = ([each[row] for row in on_host] for each in (self.ends, self.prompt_ends))
        for name in ("rows", "tokens", "visible", "offset", "prompt_end", "end", "anchor"):
            setattr(self, name, getattr(self, name)[rows])

    def as_given(self, grid: Tensor, padding: Tensor, behind: float | Tensor, new_tokens: int) -> Tensor:
        """Undoes the alignment: values of the grid in the caller's padded layout, new tokens behind the prompts.

        Args:
            grid: (B, W), one value for every column.
            padding: (B, P) values for the padding of the prompts.
            behind: value behind a row's saved tokens; one for all, or (B, 1).
            new_tokens: number of columns behind the prompts.

        Returns:
            (B, P + `new_tokens`).
        """
        prompts = padding.index_put(self._text, grid[self._columns])
        counts = self.all_end - self.all_prompt_end  # (B,)
        step = torch.arange(new_tokens, device=counts.device)
        columns = (self.all_prompt_end[:, None] + step).clamp(max=grid.shape[1] - 1)
        new = grid.gather(-1, columns).where(step < counts[:, None], behind)
        return torch.cat([prompts, new], dim=-1)


class RevealRecorder:
    """Two numbers for every column of the decoder's grid, kept for all rows whether they still decode or not.

    Args:
        tokens: (B, W) the grid of the whole batch, of which only shape and device matter.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.revealed_at = torch.zeros_like(tokens, dtype=torch.long)  # (B, W)
        self.confidence = torch.zeros_like(tokens, dtype=torch.float32)  # (B, W)

    def record(
        self, rows: Tensor, columns: slice, revealed: Tensor, confidence: Tensor, forward: Tensor | None = None
    ) -> None:
        """Notes the reveals of one step.

        Args:
            rows: (N,) indices in the batch of the rows that are still decoded.
            columns: the S columns of the step's block.
            revealed: (N, S) bool, positions that the step revealed.
            confidence: (N, S) fp32 probability of those tokens.
            forward: (N,) number of each row's own denoise forward; None for a prefill or commit, noted as 0.
        """
        at = torch.zeros_like(rows) if forward is None else forward
        self.revealed_at[rows, columns] = torch.where(revealed, at[:, None], self.revealed_at[rows, columns])
        self.confidence[rows, columns] = torch.where(revealed, confidence, self.confidence[rows, columns])

    def record_block(self, rows: Tensor, columns: slice, revealed_at: Tensor, confidence: Tensor) -> None:
        """Notes what all steps of a block revealed, as `record` does; `revealed_at`: (N, S), 0 where none did."""
        at = self.revealed_at[rows, columns]
        self.confidence[rows, columns] = confidence.where(revealed_at > 0, self.confidence[rows, columns])
        self.revealed_at[rows, columns] = revealed_at.where(revealed_at > 0, at)

    def history(self, grid: DecodingGrid, denoise_forwards: Tensor) -> RelayGenerateHistory:
        """The recorded numbers in the layout of the caller's prompts; `denoise_forwards`: (B,), one count per row."""
        prompts = grid.prompts
        revealed_at = grid.as_given(self.revealed_at, torch.full_like(prompts, -1), -1, grid.most_new)
        no_confidence = torch.zeros_like(prompts, dtype=torch.float32)
        given = torch.zeros_like(revealed_at, dtype=torch.bool)
        given[:, : prompts.shape[1]] = grid.is_text & (prompts != grid.mask_token_id)
        return RelayGenerateHistory(
            revealed_at=revealed_at,
            confidence=grid.as_given(self.confidence, no_confidence, 0.0, grid.most_new),
            given=given,
            denoise_forwards=denoise_forwards,
        )
