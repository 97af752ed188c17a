"""RelayCache: everything that decoding remembers, in one object, so that rows can come and go together.

Legend: B rows, n of them that take part in a forward, P committed positions, S positions of a block, s of a sub-block,
L of one forward, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class RelayCache(DynamicCache):
    """Keys and values of committed blocks, plus what is known of the block that is being denoised.

    Beside the keys and values lie, each with the rows as first axis:

    - `tokens`: (B, P), the committed tokens, so that a later turn of a chat can tell what it shares with them;
    - `relay_state`: (B, S, D), state of the current block, or None before its first denoising step;
    - `last_hidden`: (B, 1, D), input of the head at the last committed position;
    - `last_read_out`: (B, 1, D), what the channel reads at the last committed position;
    - `block_states`: per layer the keys and values of the current block, (B, heads, S, width) each, if they are kept
      for the sub-block cache.

    `last_hidden` and `last_read_out` let a token-shift model align position 0 of the next block, whose logits and state
    are those that the position before it produced.
    """

    # Whether gradient checkpointing may replay a forward with this cache.
    survives_checkpointing = False
    # (B, L) bool, new positions that are aligned with `last_hidden` although their predecessor is in the column before.
    is_cut: Tensor | None = None
    _ROW_TENSORS = ("tokens", "relay_state", "last_hidden", "last_read_out")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens: Tensor | None = None
        self.relay_state: Tensor | None = None
        self.last_hidden: Tensor | None = None
        self.last_read_out: Tensor | None = None
        self.block_states: dict[int, tuple[Tensor, Tensor]] = {}
        self.is_drafting = False
        # What the current forward does; set by the context managers below.
        self._commits: int | None = None
        self._keeps = False
        self._rows: Tensor | None = None
        self._columns: Tensor | None = None

    @contextmanager
    def drafting(self, keep: bool = False, rows: Tensor | None = None, columns: Tensor | None = None) -> Iterator[None]:
        """Forwards inside see the committed prefix and their own block, and leave nothing behind but what is kept.

        Args:
            keep: put the keys and values of the block into `block_states`.
            rows: (n,) indices of the rows that the forward is about; None = all.
            columns: (n, s) positions of the block that the forward computes anew; the rest of the block is what
                `block_states` has of it. None = the whole block.
        """
        self.is_drafting, self._keeps, self._rows, self._columns = True, keep, rows, columns
        try:
            yield
        finally:
            self.is_drafting, self._keeps, self._rows, self._columns = False, False, None, None

    @contextmanager
    def committing(self, count: int, keep: bool = False) -> Iterator[None]:
        """Forwards inside commit their first `count` positions and draft those behind them, which are one block.

        Args:
            count: a whole number of blocks.
            keep: put the keys and values of the block behind into `block_states`.
        """
        self._commits, self._keeps = count, keep
        try:
            yield
        finally:
            self._commits, self._keeps = None, False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns keys and values of the prefix and the new positions; stores the new ones that are committed."""
        if self.is_drafting:
            block = self._with_kept((key_states, value_states), layer_idx)
            if self.get_seq_length(layer_idx) == 0:
                return block
        else:
            committed = (key_states[:, :, : self._commits], value_states[:, :, : self._commits])
            stored = super().update(*committed, layer_idx, *args, **kwargs)
            if self._commits is None:
                return stored
            block = (key_states[:, :, self._commits :], value_states[:, :, self._commits :])
            block = self._with_kept(block, layer_idx)
        layer: Any = self.layers[layer_idx]
        return (
            torch.cat([rows_of(layer.keys, self._rows), block[0]], dim=-2),
            torch.cat([rows_of(layer.values, self._rows), block[1]], dim=-2),
        )

    def _with_kept(self, new: tuple[Tensor, Tensor], layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole block, given those that were computed anew; keeps them if asked to."""
        if not self._keeps:
            return new
        old = self.block_states.get(layer_idx)
        if self._columns is not None:
            where = self._columns[:, None, :, None].expand_as(new[0])
            kept = (rows_of(old[0], self._rows), rows_of(old[1], self._rows))
            new = (kept[0].scatter(2, where, new[0]), kept[1].scatter(2, where, new[1]))
        if self._rows is not None:
            self.block_states[layer_idx] = (
                old[0].index_copy(0, self._rows, new[0]),
                old[1].index_copy(0, self._rows, new[1]),
            )
        else:
            self.block_states[layer_idx] = new
        return new

    def rows_for_channel(
        self, read_out: Tensor, head_inputs: Tensor, is_masked: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a channel makes a state of, given what a forward computed: the same, unless rows were cut for it.

        Args:
            read_out: (B, L, D), position-aligned like the following one.
            head_inputs: (B, L, D).
            is_masked: (B, L) bool.
        """
        return read_out, head_inputs, is_masked

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many keys the forward's positions see: a recomputed sub-block sees its whole block."""
        if self._columns is not None:
            query_length = self.block_states[0][0].shape[-2]
        return super().get_mask_sizes(query_length, layer_idx)

    def write_relay_state(
        self, state: Tensor | None, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> None:
        """Stores what a denoise forward says of its rows; the others keep theirs.

        A row that merely waits for its neighbours keeps its state, so that no row depends on who shares its batch.

        Args:
            state: (n, S, D), or (n, s, D) with `columns`; None without a channel.
            rows: (n,) indices of those rows; None = all.
            columns: (n, s) positions of the block that `state` speaks about; None = all.
        """
        old = self.relay_state
        if state is not None and columns is not None:
            state = rows_of(old, rows).scatter(1, columns[..., None].expand_as(state), state.to(old.dtype))
        if state is not None and rows is not None:
            state = old.index_copy(0, rows, state.to(old.dtype))
        self.relay_state = state

    def read_relay_state(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor | None:
        """The state of these rows at these positions, as `write_relay_state` takes it; None if there is none."""
        if self.relay_state is None:
            return None
        state = rows_of(self.relay_state, rows)
        return state if columns is None else state.gather(1, columns[..., None].expand(-1, -1, state.shape[-1]))

    def outputs_before(self) -> tuple[Tensor | None, Tensor | None]:
        """`last_hidden` and `last_read_out` of the rows that the current forward is about."""
        if self.last_hidden is None:
            return None, None
        return rows_of(self.last_hidden, self._rows), rows_of(self.last_read_out, self._rows)

    def record(self, input_ids: Tensor, hidden: Tensor, read_out: Tensor) -> None:
        """Takes the tokens of a forward, (B, L), and its raw outputs, both (B, L, D): input of the head, and what the
        channel reads.

        A commit keeps its tokens and its last position, and drops what was known of the block; a draft leaves nothing.
        """
        if self.is_drafting:
            return
        ids = input_ids[:, : self._commits]
        self.tokens = ids if self.tokens is None else torch.cat([self.tokens, ids], dim=1)
        last = slice(ids.shape[1] - 1, ids.shape[1])
        # Copies: views would keep the outputs of a whole prefill alive.
        self.last_hidden, self.last_read_out = (raw[:, last].detach().clone() for raw in (hidden, read_out))
        self.relay_state = None
        if self._commits is None:
            self.block_states = {}

    @contextmanager
    def undone_by_exceptions(self) -> Iterator[None]:
        """Leaves the cache as it was if what happens inside does not come to its end, Ctrl-C included.

        Nothing is copied: no method writes into tensors that the cache holds. But they are held until the end, so that
        a conversation's prefix takes its memory twice meanwhile.
        """
        own = {**vars(self), "layers": list(self.layers), "block_states": dict(self.block_states)}
        layers = [(layer, dict(vars(layer))) for layer in self.layers]
        try:
            yield
        except BaseException:
            for state, before in [(self, own), *layers]:
                vars(state).clear()
                vars(state).update(before)
            raise

    def drop_unfinished(self) -> None:
        """Drops keys and values that a forward has left which did not come to its end, as if it had never begun."""
        known = 0 if self.tokens is None else self.tokens.shape[1]
        layer: Any
        for layer in self.layers:
            layer.crop(min(known - layer.get_seq_length(), 0))

    def forget_block(self) -> None:
        """Drops what is known of the block that was being denoised."""
        self.relay_state, self.block_states = None, {}

    def reset(self) -> None:
        super().reset()
        self.tokens = None
        self._forget_block_and_tail()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` committed positions (a number <= 0, as in transformers).

        What was remembered of the last position goes with it: a token-shift model then asks for a commit first.

        Raises:
            ValueError: the number is positive, which older versions of transformers took for the length to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"`tokens_to_remove={tokens_to_remove}` is a positive value, but `crop` takes a number <= 0: to forget "
                f"the last {tokens_to_remove} positions, give {-tokens_to_remove}."
            )
        super().crop(tokens_to_remove)
        if tokens_to_remove < 0:
            self.tokens = None if self.tokens is None else self.tokens[:, :tokens_to_remove]
            self._forget_block_and_tail()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda tensor: tensor[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _forget_block_and_tail(self) -> None:
        self.last_hidden = self.last_read_out = None
        self.forget_block()

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        for name in self._ROW_TENSORS:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, function(tensor))
        self.block_states = {
            index: (function(keys), function(values)) for index, (keys, values) in self.block_states.items()
        }


def rows_of(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """The rows with these indices, (n,); None = all."""
    return tensor if rows is None else tensor.index_select(0, rows)
