"""How the block decoder runs the network: commits, denoise forwards, and forwards that are both.

Legend: B rows still being decoded, n of them that take part in a forward, S positions of a block, s of a sub-block, N
positions that a step scores.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cache_relay import RelayCache, rows_of
from .grid_relay import DecodingGrid
from .masks_relay import block_attention_mask


@dataclass
class Draft:
    """One denoise forward.

    Args:
        active: (B,) bool, rows that it is about.
        taking_part: (n,) their indices; None = all.
        rows, places: (N,) row and position in the block of what it scores.
        begins: (B,) where the part of the block begins that is passed through the network; None = all of it is. Outside
            the block there is nothing, so that the part may be shorter.
        length: positions of that part.
    """

    active: Tensor
    taking_part: Tensor | None
    rows: Tensor
    places: Tensor
    begins: Tensor | None
    length: int


class ForwardPasses:
    """Runs the model over columns of the grid, with the cache in the right mode.

    Args:
        model: called as `model(input_ids, ...)`, plus its initial relay state.
        cache: holds what one forward leaves for the next.
        grid: the rows.
        use_relay: carry the state between denoising steps.
        keeps_block: keep the keys and values of the current block, so that a step may recompute a part of it.
    """

    def __init__(
        self,
        model: Any,
        cache: RelayCache,
        grid: DecodingGrid,
        *,
        use_relay: bool,
        keeps_block: bool,
    ) -> None:
        self.model = model
        self.cache = cache
        self.grid = grid
        self.use_relay = use_relay
        self.keeps_block = keeps_block
        self._uncommitted: slice | None = None

    def commit(self, begin: int, stop: int) -> None:
        """Writes known columns to the cache, without any relay state."""
        self.model(
            self.grid.tokens[:, begin:stop],
            attention_mask=self.grid.attention_mask(stop),
            position_ids=self.grid.positions(begin, stop),
            cache=self.cache,
            logits_to_keep=self.grid.rows.new_empty(0),
            output_relay_state=False,
        )

    def commit_later(self, begin: int, stop: int) -> None:
        """Leaves known columns to the next denoise forward."""
        self._uncommitted = slice(begin, stop)

    @property
    def is_commit_due(self) -> bool:
        """Whether the next denoise forward commits the block before its own."""
        return self._uncommitted is not None

    def begin_block(self, columns: slice) -> None:
        """The next denoise forwards are about these columns; nothing of the block before them is carried over."""
        self.cache.forget_block()
        self.columns = columns
        self._is_first = True
        self._masks: dict[int, Any] = {}

    @property
    def is_block_new(self) -> bool:
        """Whether no forward has been about the block yet."""
        return self._is_first

    def look(self, draft: Draft) -> None:
        """Runs the network for the rows that take part with nothing injected, only for the state that it leaves."""
        nowhere = draft.rows[:0]
        self.denoise(replace(draft, rows=nowhere, places=nowhere), injects=False)

    def denoise(self, draft: Draft, injects: bool = True) -> Tensor:
        """Runs the network for the rows that take part, and keeps the state that it leaves them.

        Args:
            draft: what it is about.
            injects: let it receive the state of the forward before, or the initial one.

        Returns:
            (N, D) inputs of the head at the positions to be scored.
        """
        # At the first step there is nothing yet that a row left out could keep.
        rows = None if self._is_first else draft.taking_part
        self._is_first = False
        if self._uncommitted is not None:
            return self._commit_and_denoise(draft, self._uncommitted, injects)
        block, places, where = self.grid.tokens[:, self.columns], draft.places, draft.rows
        ids = rows_of(block, rows)
        positions = self.grid.positions(self.columns.start, self.columns.stop)
        if len(positions) > 1:
            positions = rows_of(positions, rows)
        if rows is not None:
            # From a row of the batch to its place among those that take part.
            where = (draft.active.cumsum(0) - 1)[where]
        columns = None
        if draft.begins is not None:
            begins = rows_of(draft.begins, rows)[:, None]
            columns = begins + torch.arange(draft.length, device=ids.device)
            # Where the part is cut off by an end of the block, that position comes several times, each time the same.
            columns = columns.clamp(min=0, max=ids.shape[1] - 1)
            ids, positions = ids.gather(1, columns), positions.expand(len(ids), -1).gather(1, columns)
            places = places - draft.begins[draft.rows]
        with self.cache.drafting(self.keeps_block, rows, columns):
            output = self.model(
                ids,
                attention_mask=self._draft_mask(ids, rows),
                position_ids=positions,
                cache=self.cache,
                relay_state=self._state(rows, columns, len(ids)) if injects else None,
                logits_to_keep=(where, places),
                unscored=True,
                output_relay_state=self.use_relay,
            )
        state = output.relay_state
        if columns is not None and state is not None:
            state = self._unambiguous(state, rows, columns, columns - begins)
        if self.use_relay:
            self.cache.write_relay_state(state, rows, columns)
        return output.head_inputs

    def _unambiguous(self, state: Tensor, rows: Tensor | None, columns: Tensor, places: Tensor) -> Tensor:
        """The state of a part of the block, with one value for positions that came several times.

        Args:
            state: (n, s, D) as the forward left it.
            rows: (n,) rows that took part; None = all.
            columns: (n, s) positions of the block.
            places: (n, s) where in `state` the value of each is.
        """
        state = state.gather(1, places[..., None].expand_as(state))
        if not self.model.config.token_shift:
            return state
        # What a part alone says of its first position is not aligned; that position is known by then.
        old = self.cache.read_relay_state(rows, columns)
        return old if old is None else state.where((columns != columns[:, :1])[..., None], old.to(state.dtype))

    def _state(self, rows: Tensor | None, columns: Tensor | None, count: int) -> Tensor | None:
        """State that goes into a forward over `count` rows."""
        if not self.use_relay:
            return None
        if self.cache.relay_state is None:
            return self.model.initial_relay_state(count, self.grid.width)
        return self.cache.read_relay_state(rows, columns)

    def _commit_and_denoise(self, draft: Draft, before: slice, injects: bool) -> Tensor:
        """The first denoise forward of a block, which also commits the columns `before` it."""
        width, stop = before.stop - before.start, self.columns.stop
        ids, receives = self.grid.tokens[:, before.start : stop], None
        state = self._state(None, None, len(ids)) if injects else None
        if state is not None:
            state = torch.cat([torch.zeros_like(state[:, :1]).expand(-1, width, -1), state], dim=1)
            receives = self.model.receives_state(ids)
            receives[:, :width] = False  # the state never reaches committed keys and values
        with self.cache.committing(width, self.keeps_block):
            output = self.model(
                ids,
                attention_mask=self.grid.attention_mask(stop),
                position_ids=self.grid.positions(before.start, stop),
                cache=self.cache,
                relay_state=state,
                relay_mask=receives,
                logits_to_keep=(draft.rows, draft.places + width),
                unscored=True,
                output_relay_state=self.use_relay,
            )
        self._uncommitted = None
        if self.use_relay and output.relay_state is not None:
            self.cache.write_relay_state(output.relay_state[:, width:])
        return output.head_inputs

    def _draft_mask(self, ids: Tensor, rows: Tensor | None) -> Any:
        """The attention mask of a draft, prepared once per block: to do so, transformers waits for the device."""
        visible, length = self.grid.attention_mask(self.columns.stop), ids.shape[1]
        if visible is None:
            return None
        if length not in self._masks:
            self._masks[length] = self._make_draft_mask(visible, length)
        mask = self._masks[length]
        if mask is None or rows is None:
            return mask
        # Flex attention's masks are functions of a row's number, and cannot be indexed.
        return mask[rows] if isinstance(mask, Tensor) else self._make_draft_mask(visible[rows], length)

    def _make_draft_mask(self, visible: Tensor, length: int) -> Any:
        like = torch.empty(len(visible), length, 0, dtype=self.model.dtype, device=visible.device)
        return block_attention_mask(self.model.model.config, like, visible, self.cache, self.model.config.block_size)
