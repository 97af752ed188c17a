"""The rows that are decoded together, side by side: their tokens, their ends, and what they cost.

Rows of different prompt lengths are decoded together, each from the block that its own prompt ends in. The grid is
therefore aligned on that block border: row r is shifted right by `offset[r]` columns, so that column c holds its
position c - offset[r], and all rows commit the same columns at the same time. What a row computes depends on its own
positions only, so a batch gives what its rows give alone. For the same reason the rows of another grid can join at a
block border, and columns that no row has a position in can go.

Legend: B rows still being decoded, W columns of the grid, S positions of a block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration_relay import RelayConfig
from .generation_candidates_relay import Texts
from .generation_given_relay import GivenBatch

# Behind all columns.
ENDLESS = 2**62


class DecodingGrid:
    """Tokens of all rows, with the borders between prompts, new tokens and what fills up the last block.

    Args:
        batch: the rows as they were given.
        seeds: (B,) long, seeds of the random numbers that a row's tokens are drawn with.
        new_tokens: number of tokens to append to every row; 0 = only masks of a canvas are filled.
        config: configuration of the model. The masks that fill up the last block stop at the model's last position.
        sub_block_size: positions of a sub-block, or None; where text is appended to a canvas, sub-blocks begin with it.

    Raises:
        ValueError: a row is empty, a prompt of a block model holds [MASK], or there is nothing to fill in.

    Attributes:
        batches: the batches whose rows are decoded; the rows of each are side by side, in this order.
        width: S, columns of a block.
        begin: column of the block that is decoded next; at first that in which each prompt ends.
        tokens: (B, W) tokens of the rows, [MASK] where none is revealed yet.
        visible: (B, W) bool, columns that hold a position of the row.
        offset: (B,) column of the row's position 0.
        prompt_end: (B,) column of the first new token.
        end: (B,) column behind the last token; moves left when the row stops.
        limit: (B,) column behind the row's last position.
        offsets, prompt_ends, ends, limits: the same numbers on the host, so that nobody has to wait for them.
        anchor: (B,) column from which sub-blocks are counted.
        denoise_forwards, commit_forwards, prefill_forwards, reference_forwards: (B,) forwards of each row.
        appends: whether new tokens follow the prompts.
    """

    _COLUMNS = ("offset", "prompt_end", "end", "limit", "anchor")
    _ON_HOST = ("offsets", "prompt_ends", "ends", "limits")
    _FORWARDS = ("denoise_forwards", "commit_forwards", "prefill_forwards", "reference_forwards")
    _OF_ROWS = ("tokens", "seeds", *_COLUMNS, *_FORWARDS)

    def __init__(
        self, batch: GivenBatch, seeds: Tensor, new_tokens: int, config: RelayConfig, sub_block_size: int | None
    ) -> None:
        block_size, positions = config.block_size, config.positions
        batch.prompts.check(new_tokens, block_size)
        self.batches = [batch]
        self.appends, self.is_canvas = new_tokens > 0, block_size is None
        self.mask_token_id: Any = config.mask_token_id

        # On the host: columns of the grid.
        longest = max(batch.prompts.lengths) + new_tokens
        self.width = longest if block_size is None else block_size
        starts = [0 if block_size is None else length // block_size * block_size for length in batch.prompts.lengths]
        self.begin = max(starts)
        self.offsets = [self.begin - start for start in starts]
        self.prompt_ends = [offset + n for offset, n in zip(self.offsets, batch.prompts.lengths, strict=True)]
        self.ends = [prompt_end + new_tokens for prompt_end in self.prompt_ends]
        self.last_position = None if positions is None else max(positions, longest) - 1
        if block_size is None:
            self.limits = list(self.ends)
        elif positions is None:
            self.limits = [ENDLESS] * len(starts)
        else:
            self.limits = [max(end, n + positions) for end, n in zip(self.ends, self.offsets, strict=True)]

        # On the device: the same for each row.
        lengths = batch.prompts.is_text.sum(-1)  # (B,)
        begins = torch.zeros_like(lengths) if block_size is None else lengths // block_size * block_size
        self.offset = self.begin - begins
        self.prompt_end = self.offset + lengths
        self.end = self.prompt_end + new_tokens
        if block_size is None:
            self.limit = self.end.clone()
        elif positions is None:
            self.limit = torch.full_like(self.end, ENDLESS)
        else:
            self.limit = self.end.maximum(self.offset + positions)
        begins_with_text = self.is_canvas and self.appends and sub_block_size is not None
        self.anchor = self.prompt_end.clone() if begins_with_text else torch.zeros_like(self.prompt_end)
        self.seeds = seeds
        self.denoise_forwards, self.commit_forwards, self.prefill_forwards, self.reference_forwards = (
            torch.zeros_like(lengths) for _ in self._FORWARDS
        )
        self.tokens = batch.place(self.offset, self.prompt_end, self.end, self._columns_needed())
        self.visible, self.is_padded = self._seen()

    def _columns_needed(self) -> int:
        """W: whole blocks, up to the end of the longest row."""
        return self.begin + max(-(-(end - self.begin) // self.width) for end in self.ends) * self.width

    def _seen(self) -> tuple[Tensor, bool]:
        """`visible`, and whether any column is not."""
        column = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        visible = (column >= self.offset[:, None]) & (column < self.limit[:, None])
        return visible, any(self.offsets) or self.visible_stop < len(column)

    @property
    def visible_stop(self) -> int:
        """The first column, behind the prompts, that holds no position of some row."""
        return min([*self.limits, self.tokens.shape[1]])

    @property
    def block(self) -> slice:
        """Columns of the block that is decoded next."""
        return slice(self.begin, self.begin + self.width)

    def parts(self) -> Iterator[tuple[GivenBatch, slice]]:
        """Each batch, and which rows are its own."""
        begin = 0
        for batch in self.batches:
            yield batch, slice(begin, begin + batch.count)
            begin += batch.count

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

    def shown(self, row: int, columns: slice) -> Tensor:
        """The tokens of a row's block that a streamer gets: new ones, or all if nothing is appended."""
        first = max(columns.start, self.prompt_ends[row]) if self.appends else columns.start
        return self.tokens[row, first : min(columns.stop, self.ends[row])].cpu()

    def move_ends(self, end: Tensor, ends: list[int], rows: slice | None = None) -> None:
        """Ends these rows, or all, there: columns of each, and the same on the host."""
        if rows is not None:
            behind = slice(rows.stop, None)
            end = torch.cat([self.end[: rows.start], end, self.end[behind]])
            ends = [*self.ends[: rows.start], *ends, *self.ends[behind]]
        self.end, self.ends = end, ends

    # -- rows that leave and come ------------------------------------------------------------------------------------

    def save(self, batch: GivenBatch, rows: slice, stop: int) -> None:
        """Saves what these rows of a batch have come to up to column `stop`."""
        forwards = torch.stack([getattr(self, name)[rows] for name in self._FORWARDS])
        batch.save(self.tokens[rows], self.end[rows].clamp(max=stop), forwards)

    def retire(self, stop: int) -> Tensor | None:
        """Drops the rows that end before column `stop`.

        Returns:
            (n,) indices of the rows that stay, or None if all do.
        """
        stays = [row for row, end in enumerate(self.ends) if end > stop]
        if len(stays) == len(self.ends):
            return None
        alive = torch.nonzero_static(self.end > stop, size=len(stays))[:, 0]
        self.keep(alive, stays, stop)
        return alive

    def keep(self, rows: Tensor, on_host: list[int], stop: int) -> None:
        """Drops all rows but those with these indices, (n,), and the same on the host; they have come to `stop`."""
        news = [min(end, stop) - prompt_end for end, prompt_end in zip(self.ends, self.prompt_ends, strict=True)]
        kept, begin = set(on_host), 0
        for batch, own in list(self.parts()):
            mine = range(own.start, own.stop)
            if dropped := [news[row] for row in mine if row not in kept]:
                self.save(batch, own, stop)
                batch.most_new = max([batch.most_new, *dropped])
            count = len(mine) - len(dropped)
            batch.keep(rows[begin : begin + count] - own.start, count)
            begin += count
        self.batches = [batch for batch in self.batches if batch.count]
        for name in self._ON_HOST:
            setattr(self, name, [getattr(self, name)[row] for row in on_host])
        for name in self._OF_ROWS:
            setattr(self, name, getattr(self, name)[rows])
        self.visible, self.is_padded = self._seen()

    def trim(self) -> int:
        """Drops the columns in front in which no row has a position, and those behind all blocks of the rows.

        Returns:
            How many columns in front.
        """
        count = min(self.offsets)
        self._move(-count, self._columns_needed() - count)
        return count

    def join(self, other: "DecodingGrid") -> None:
        """Takes the rows of another grid, so that the blocks that both decode next are in the same columns."""
        begin = max(self.begin, other.begin)
        stop = begin + max(grid.tokens.shape[1] - grid.begin for grid in (self, other))
        for grid in (self, other):
            grid._move(begin - grid.begin, stop)
        for name in self._OF_ROWS:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        for name in ("batches", *self._ON_HOST):
            setattr(self, name, [*getattr(self, name), *getattr(other, name)])
        if self.last_position is not None and other.last_position is not None:
            self.last_position = max(self.last_position, other.last_position)
        self.width = stop if self.is_canvas else self.width
        self.visible, self.is_padded = self._seen()

    def _move(self, by: int, columns: int) -> None:
        """Moves all rows to the right, or to the left, in a grid of so many columns; the new ones hold [MASK]."""
        self.tokens = F.pad(self.tokens, (by, columns - by - self.tokens.shape[1]), value=self.mask_token_id)
        self.begin += by
        for name in self._COLUMNS:
            setattr(self, name, getattr(self, name) + by)
        for name in self._ON_HOST:
            setattr(self, name, [column + by for column in getattr(self, name)])
        for batch in self.batches:
            batch.shift += by
        self.visible, self.is_padded = self._seen()
