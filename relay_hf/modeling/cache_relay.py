"""RelayCache: everything that decoding remembers, in one object, so that rows can come and go together.

Legend: B rows, n of them that take part in a forward, P committed positions, S positions of a block, s of a sub-block,
L of one forward, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache

from .cache_layers_relay import RelayLayer
from .prefix_relay import OtherCache, Prefix, rows_of


class BlockPrefix(Prefix):
    """The committed text, with the forward's own keys and values written in place behind it.

    They stay there until the next forward, so that `RelayCache.commit` need only move a length, and a forward over a
    part of the block sees the rest of it as an earlier forward left it.

    Args:
        cache: whose text it is.
        rows: (n,) rows that the forward runs; None = all.
        places: (n, s) positions of the block that the forward runs; None = all.
        width: S, positions of the block, with `places`.
        is_one_block: whether the forward is about one block only.
        is_aligned: as in `Prefix`.
        masks: how many [MASK]s the forward runs; None = unknown.
    """

    can_replay = False
    is_in_place = True

    def __init__(
        self,
        cache: "RelayCache",
        rows: Tensor | None,
        places: Tensor | None,
        width: int | None,
        is_one_block: bool,
        is_aligned: bool,
        masks: int | None,
    ) -> None:
        before, read_out_before = cache._tail(rows)
        super().__init__(
            cache.layers,
            cache.get_seq_length(),
            rows=rows,
            before=before,
            read_out_before=read_out_before,
            is_one_block=is_one_block,
            is_aligned=is_aligned,
            masks=masks,
        )
        self.places = places
        self.width = width
        self.wanted = cache.wanted

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(RelayLayer(self.wanted))
        width = key_states.shape[-2] if self.width is None else self.width
        layer: Any = self.layers[layer_idx]
        layer.write((key_states, value_states), self.rows, self.places, width)
        return layer.memory if self.shows_memory else layer.seen(self.rows, width)

    def check_rows(self, count: int) -> None:
        layers: list[Any] = self.layers
        memory = layers[0].memory if layers else None
        if self.rows is None and memory is not None and len(memory[0]) != count:
            raise ValueError(
                f"The forward runs {count} row(s), but the cache holds {len(memory[0])}: pass as many, or, for many "
                "rows behind the text of one, `cache=cache.shared_prefix()`."
            )

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length if self.width is None else self.width, layer_idx)


class RelayCache(DynamicCache):
    """Committed text, and the block that is being denoised.

    Of the committed text it holds keys and values (`layers`) and, each with the rows as first axis:

    - `tokens`: (B, P), so that a later turn of a chat finds what it shares with them;
    - `last_hidden`: (B, 1, D), raw input of the head at the last position;
    - `last_read_out`: (B, 1, D), what the channel reads there. A token-shift model aligns position 0 of the next block
      with both: its logits and state are those that the position before it produced.

    Of the block in work it holds `relay_state`, (B, S, D), None before the first denoise step, and, in the memory of
    the layers behind the committed text, the keys and values of its last forward.

    Args:
        config: configuration of the backbone; None = layers come with the first forward.
    """

    _ROW_TENSORS = ("tokens", "relay_state", "last_hidden", "last_read_out")

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        super().__init__()
        self.layer_class_to_replicate = RelayLayer
        self.layers: list[Any] = [RelayLayer() for _ in range(config.num_hidden_layers)] if config is not None else []
        self.tokens: Tensor | None = None
        self.relay_state: Tensor | None = None
        self.last_hidden: Tensor | None = None
        self.last_read_out: Tensor | None = None
        self.wanted = 0  # capacity of layers that are still to come
        self._in_work: BlockPrefix | None = None  # of the last forward over the block in work
        self._is_inference = False  # whether memory may have been taken in inference mode

    def reserve(self, positions: int) -> None:
        """Lets the next forward take memory for so many positions, committed ones and a block, at once."""
        self.wanted = positions
        for layer in self.layers:
            layer.wanted = positions

    def trim(self) -> None:
        """Gives back the memory behind the committed text, at the price of copying that once."""
        self.wanted, self._in_work = 0, None
        for layer in self.layers:
            layer.wanted = 0
            layer.copy()

    def prefix(
        self,
        rows: Tensor | None = None,
        places: Tensor | None = None,
        width: int | None = None,
        is_one_block: bool = True,
        is_aligned: bool = False,
        masks: int | None = None,
    ) -> BlockPrefix:
        """What a forward over the block behind the committed text sees; arguments of `BlockPrefix`."""
        # Here and not where it is written, because compiled code cannot ask.
        if self._is_inference and not torch.is_inference_mode_enabled():
            for layer in self.layers:
                layer.copy()  # outside, what was taken in inference mode cannot be written
        self._is_inference = torch.is_inference_mode_enabled()
        self._in_work = BlockPrefix(self, rows, places, width, is_one_block, is_aligned, masks)
        return self._in_work

    def shared_prefix(self, rows: Tensor | None = None) -> Prefix:
        """The committed text for a forward over any number of rows, which leaves nothing here.

        Args:
            rows: (n or 1,) the row of the cache whose text each row of the forward sees; None = the only one.
        """
        before, read_out_before = self._tail(rows)
        return Prefix(
            self.layers,
            self.get_seq_length(),
            rows=rows,
            before=before,
            read_out_before=read_out_before,
            is_one_block=True,
        )

    def _tail(self, rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """`last_hidden` and `last_read_out` of these rows."""
        hidden, read_out = (
            None if tail is None else rows_of(tail, rows) for tail in (self.last_hidden, self.last_read_out)
        )
        return hidden, read_out

    def keep_shared(self, tokens: Tensor, block: int, recommitted: int) -> int:
        """Crops the text of the only row to the whole blocks that it shares with another text.

        Args:
            tokens: (1, L) the other text.
            block: positions of a block.
            recommitted: how many shared positions to forget as well whenever something is cropped.

        Returns:
            Positions that are kept.
        """
        cached = self.get_seq_length()
        if self.tokens is None:
            return 0
        length = min(cached, tokens.shape[1])
        is_same = self.tokens[0, :length] == tokens[0, :length]
        shared = int(is_same.long().cumprod(0).sum()) // block * block
        if shared < cached:
            shared = max(shared - recommitted, 0)
            self.crop(shared - cached)
        return shared

    def commit(self, prefix: Prefix, input_ids: Tensor) -> None:
        """Commits the first positions of the last forward over all rows, and forgets the block in work.

        Args:
            prefix: the prefix of that forward, made by this cache.
            input_ids: (B, L) tokens of those positions, a whole number of blocks.

        Raises:
            ValueError: another forward has written behind the committed text since, or none; or it ran some rows or
                positions only.
        """
        ran = prefix.hidden is not None and prefix is self._in_work
        if not ran or prefix.rows is not None or self._in_work.places is not None:
            raise ValueError(
                "`commit` takes the prefix of the cache's last forward, over all rows and positions: make it by "
                "`prefix = cache.prefix()`, call the model with `cache=prefix`, and then commit."
            )
        last = slice(input_ids.shape[1] - 1, input_ids.shape[1])
        self.append(input_ids, *(None if raw is None else raw[:, last] for raw in (prefix.hidden, prefix.read_out)))

    def append(self, input_ids: Tensor, last_hidden: Tensor | None, last_read_out: Tensor | None) -> None:
        """Commits positions whose keys and values are behind the committed ones; forgets the block in work.

        Args:
            input_ids: (B, L) tokens of those positions, a whole number of blocks.
            last_hidden: (B, 1, D) raw input of the head at the last one.
            last_read_out: (B, 1, D), what the channel reads there.
        """
        for layer in self.layers:
            layer.advance(input_ids.shape[1])
        self.tokens = input_ids if self.tokens is None else torch.cat([self.tokens, input_ids], dim=1)
        # Copies: views would keep the outputs of a whole prefill alive.
        self.last_hidden, self.last_read_out = (
            None if raw is None else raw.detach().clone() for raw in (last_hidden, last_read_out)
        )
        self.relay_state = self._in_work = None

    def write_relay_state(self, state: Tensor | None, rows: Tensor | None = None, places: Tensor | None = None) -> None:
        """Stores the state that a denoise forward leaves its rows; the others keep theirs.

        A row that merely waits for its neighbours keeps its state, so that no row depends on who shares its batch.

        Args:
            state: (n, S, D), or (n, s, D) with `places`; None without a channel.
            rows: (n,) indices of those rows; None = all.
            places: (n, s) positions of the block; None = all.
        """
        if rows is None and places is None:
            self.relay_state = state
        elif state is not None and self.relay_state is not None:
            self.relay_state[self._where(rows, places)] = state.to(self.relay_state.dtype)

    def read_relay_state(self, rows: Tensor | None = None, places: Tensor | None = None) -> Tensor | None:
        """The state of these rows at these positions, as `write_relay_state` takes it; None if there is none."""
        if self.relay_state is None or (rows is None and places is None):
            return self.relay_state
        return self.relay_state[self._where(rows, places)]

    def _where(self, rows: Tensor | None, places: Tensor | None) -> Any:
        if places is None:
            return rows
        every = torch.arange(len(places), device=places.device) if rows is None else rows
        return every[:, None], places

    @contextmanager
    def undone_by_exceptions(self) -> Iterator[None]:
        """Leaves the cache as it was if what happens inside does not come to its end, Ctrl-C included.

        Nothing is copied: no method writes to committed numbers. But they are held until the end, so that a
        conversation's prefix takes its memory twice meanwhile.
        """
        own = {**vars(self), "layers": list(self.layers)}
        layers = [(layer, dict(vars(layer))) for layer in self.layers]
        try:
            yield
        except BaseException:
            for state, before in [(self, own), *layers]:
                vars(state).clear()
                vars(state).update(before)
            raise

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

    def drop_columns(self, count: int) -> None:
        """Forgets the first committed positions of every row, which are padding."""
        for layer in self.layers:
            layer.drop_columns(count)
        self.tokens = None if self.tokens is None else self.tokens[:, count:]
        self._in_work = None

    def reopen(self, count: int) -> None:
        """Forgets the last committed positions, for a forward that commits them again.

        The tail stays: what that forward aligns with it, its first position, is of a block that nobody reads again.
        """
        tail = self.last_hidden, self.last_read_out
        self.crop(-count)
        self.last_hidden, self.last_read_out = tail

    def join(self, other: "RelayCache", rows: tuple[int, int], length: int) -> None:
        """Takes the rows of another cache behind its own, between two blocks; zeros fill up shorter texts in front.

        Args:
            other: a cache of the same model, which is not used afterwards.
            rows: how many rows this cache has, and how many the other one.
            length: committed positions of both afterwards, at least as many as either has.
        """
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.join(theirs, rows, length)
        for name, columns in (("tokens", length), ("last_hidden", 1), ("last_read_out", 1)):
            setattr(self, name, _joined([getattr(cache, name) for cache in (self, other)], rows, columns))
        self.relay_state = self._in_work = None

    def _forget_block_and_tail(self) -> None:
        self.last_hidden = self.last_read_out = self.relay_state = self._in_work = None

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        self._in_work = None
        for name in self._ROW_TENSORS:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, function(tensor))


def _joined(both: list[Tensor | None], rows: tuple[int, int], length: int) -> Tensor | None:
    """Rows of two tensors, (n, <= length, ..), one below the other; zeros in front of the shorter, or for a missing
    one."""
    held = [tensor for tensor in both if tensor is not None]
    if not held:
        return None
    joined = held[0].new_zeros(sum(rows), length, *held[0].shape[2:])
    for tensor, part in zip(both, (slice(0, rows[0]), slice(rows[0], None)), strict=True):
        if tensor is not None:
            joined[part, length - tensor.shape[1] :] = tensor
    return joined


def prefix_of(cache: Cache | None) -> Prefix:
    """What a forward sees that was given `cache`: a prefix, a cache to commit to, one of another kind, or nothing."""
    if isinstance(cache, Prefix):
        return cache
    if isinstance(cache, RelayCache):
        return cache.prefix(is_one_block=False)
    return Prefix([], 0) if cache is None else OtherCache(cache)
