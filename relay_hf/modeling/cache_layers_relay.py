"""Keys and values of one layer: committed ones, and room behind them for the block in work.

Legend: B rows, n of them that take part in a forward, P committed positions, L of one forward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class RelayLayer(DynamicLayer):
    """Keys and values of one layer, in memory with room for the block in work behind the committed ones.

    Committed numbers are never written again, so that whoever holds `keys` and `values` may rely on them.

    Attributes:
        memory: keys and values, (B, heads, capacity, width) each; None before the first forward.
        length: P.
        wanted: capacity of the memory that is taken next, if a forward needs no more.
        keys, values: views of the committed ones, (B, heads, P, width).
    """

    def __init__(self, wanted: int = 0) -> None:
        super().__init__()
        self.memory: tuple[Tensor, Tensor] | None = None
        self.length = 0
        self.wanted = wanted

    @classmethod
    def of(cls, memory: tuple[Tensor, Tensor], length: int) -> "RelayLayer":
        """A layer in this memory, (B, heads, capacity, width) each, whose first `length` positions are committed."""
        layer = cls()
        layer._hold(memory, length)
        return layer

    def write(self, new: tuple[Tensor, Tensor], rows: Tensor | None, places: Tensor | None, width: int) -> None:
        """Writes keys and values behind the committed ones, without committing them.

        Args:
            new: (n, heads, L, width) keys, and values.
            rows: (n,) whose they are; None = of all rows.
            places: (n, L) where they belong behind the committed ones; None = side by side.
            width: positions behind the committed ones that the forward sees.
        """
        begin, end = self.length, self.length + width
        memory = self._room_for(new, end)
        for held, states in zip(memory, new, strict=True):
            if places is not None:
                every = torch.arange(len(states), device=states.device) if rows is None else rows
                held[every[:, None], :, begin + places] = states.transpose(1, 2)
            elif rows is not None:
                held[rows, :, begin:end] = states
            else:
                held[:, :, begin:end] = states

    def seen(self, rows: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values of these rows, committed ones and `width` more, (n, heads, P + width, width).

        Of all rows they are views, of some they are copies.
        """
        memory: Any = self.memory
        keys, values = (held[:, :, : self.length + width] for held in memory)
        return (keys, values) if rows is None else (keys[rows], values[rows])

    def _room_for(self, new: tuple[Tensor, Tensor], end: int) -> tuple[Tensor, Tensor]:
        """The memory; taken anew if it ends before `end`, or must not be written in place."""
        held, dtype = self.memory, new[0].dtype
        if held is not None:
            dtype = torch.promote_types(held[0].dtype, dtype)
            has_graph = held[0].requires_grad or (torch.is_grad_enabled() and new[0].requires_grad)
            if held[0].shape[2] >= end and held[0].dtype == dtype and not has_graph:
                return held
        rows = len(new[0] if held is None else held[0])
        capacity = self.wanted
        if capacity < end:  # half as much again, so that many commits do not copy the text each time
            capacity = end if held is None else end + end // 2
        # Token by token, as variable-length attention reads it.
        shapes = [(rows, capacity, states.shape[1], states.shape[3]) for states in new]
        keys, values = (
            states.new_empty(shape, dtype=dtype).transpose(1, 2) for states, shape in zip(new, shapes, strict=True)
        )
        if self.length:
            keys[:, :, : self.length], values[:, :, : self.length] = self.keys, self.values
        self._hold((keys, values), self.length)
        return keys, values

    def advance(self, count: int) -> None:
        """Commits the first `count` positions behind the committed ones."""
        self._hold(self.memory, self.length + count)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.write((key_states, value_states), None, None, key_states.shape[-2])
        self.advance(key_states.shape[-2])
        return self.keys, self.values

    def copy(self) -> None:
        """Moves the committed numbers to memory that ends with them."""
        self._map(lambda held: held.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2))

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        super().reset()
        self.memory, self.length = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.memory is not None:
            self._map(lambda held: held[:, :, :tokens_to_remove])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda held: held[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda held: held.repeat_interleave(repeats, dim=0))

    def drop_columns(self, count: int) -> None:
        """Forgets the first positions of every row, which are padding."""
        self._map(lambda held: held[:, :, count:])

    def join(self, other: "RelayLayer", rows: tuple[int, int], length: int) -> None:
        """Takes the rows of another layer behind its own; all then end at the same position, behind zeros.

        Args:
            other: the other layer.
            rows: how many rows this layer has, and how many the other one.
            length: committed positions of both afterwards, at least as many as either has.
        """
        filled = [layer for layer in (self, other) if layer.length]
        if not filled:
            self.memory = None
            return
        both: list[Any] = [layer.memory for layer in filled]
        memory, capacity = [], max(self.wanted, length)
        for index, held in enumerate(both[0]):
            dtype = torch.promote_types(held.dtype, both[-1][index].dtype)
            # Token by token, as `_room_for` lays it out.
            new = held.new_zeros((sum(rows), capacity, held.shape[1], held.shape[3]), dtype=dtype).transpose(1, 2)
            for layer, part in ((self, slice(0, rows[0])), (other, slice(rows[0], None))):
                if layer.length:
                    new[part, :, length - layer.length : length] = (layer.keys, layer.values)[index]
            memory.append(new)
        self._hold(tuple(memory), length)

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Changes the committed numbers; the next forward takes memory anew."""
        if self.memory is not None:
            keys, values = function(self.keys), function(self.values)
            self._hold((keys, values), keys.shape[-2])

    def _hold(self, memory: Any, length: int) -> None:
        self.memory, self.length, self.is_initialized = memory, length, True
        self.keys, self.values = (held[:, :, :length] for held in memory)
