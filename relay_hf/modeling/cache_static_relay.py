"""Memory of static steps: tensors of few shapes that stay where they are, so that a graph can be replayed on them.

Legend: R rows that there is room for, B rows in work (the first B of them), S positions of a block, C columns that
there is room for, D hidden size, W width of the state.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .cache_layers_relay import RelayLayer
from .cache_relay import RelayCache
from .generation_candidates_relay import Texts
from .prefix_relay import Prefix

COLUMNS_AT_LEAST = 256


def coarse(length: int, least: int) -> int:
    """The length, rounded up to one of few: at most two in each octave, all of them multiples of `least`."""
    step = max(least, 1 << max((length - 1).bit_length() - 2, 0))
    return -(-length // step) * step


@dataclass
class StaticBlock:
    """The block in work; columns are counted from its first one.

    Args:
        tokens, visible, prompt_end, end, anchor: the block's text, as in `Texts`.
        positions: (B, S) long, each row's positions.
        seeds: (B,) seeds of its random numbers.
        forwards: (B,) denoise forwards that it has had.
        masks_at_begin: (B,) its positions that were masked when the block began, at least 1.
        sub_block: (B,) number of the sub-block that its last step was about.
        step: (B,) steps within that sub-block.
        total: (B,) positions that these steps have to reveal in all.
        state: (B, S, W) relay state.
        has_state: (B, 1) bool, whether there is one to inject.
        before: (B, 1, D) raw input of the head at the position before the block.
        read_out_before: (B, 1, D) what the channel reads there.
        revealed_at: (B, S) long, number of the forward that revealed a position, 0 if none did.
        confidence: (B, S) fp32, probability of the token then.
        columns: (S,) long, columns of the memory in which the block's keys and values belong.
        seen: (R * C,) bool, room for the columns of the memory that each row sees.
    """

    tokens: Tensor
    visible: Tensor
    prompt_end: Tensor
    end: Tensor
    anchor: Tensor
    positions: Tensor
    seeds: Tensor
    forwards: Tensor
    masks_at_begin: Tensor
    sub_block: Tensor
    step: Tensor
    total: Tensor
    state: Tensor
    has_state: Tensor
    before: Tensor
    read_out_before: Tensor
    revealed_at: Tensor
    confidence: Tensor
    columns: Tensor
    seen: Tensor

    @classmethod
    def empty(cls, model: Any, rows: int, width: int, capacity: int) -> "StaticBlock":
        """Memory for a block of R rows. The state is kept in fp32, which holds all narrower numbers exactly."""
        hidden, exact = model.config.text_config.hidden_size, torch.promote_types(model.dtype, torch.float32)
        shapes = {
            **dict.fromkeys(("tokens", "positions", "revealed_at", "visible", "confidence"), (rows, width)),
            "state": (rows, width, model.config.relay_state_width),
            "has_state": (rows, 1),
            **dict.fromkeys(("before", "read_out_before"), (rows, 1, hidden)),
            "columns": (width,),
            "seen": (rows * capacity,),
        }
        dtypes = {
            **dict.fromkeys(("visible", "has_state", "seen"), torch.bool),
            **dict.fromkeys(("state", "before", "read_out_before"), exact),
            "confidence": torch.float32,
        }
        names = [field.name for field in fields(cls)]
        zeros = {
            name: torch.zeros(shapes.get(name, (rows,)), dtype=dtypes.get(name, torch.long), device=model.device)
            for name in names
        }
        return cls(**zeros)

    @property
    def texts(self) -> Texts:
        """The block's text."""
        return Texts(self.tokens, self.visible, self.prompt_end, self.end, self.anchor)

    def of_rows(self, rows: int) -> "StaticBlock":
        """The block of the first rows, in the same memory."""
        parts = {field.name: getattr(self, field.name)[:rows] for field in fields(self)}
        parts |= {"columns": self.columns, "seen": self.seen}
        return StaticBlock(**{name: in_place(part) for name, part in parts.items()})

    def sees(self, visible: Tensor, columns: int) -> Tensor:
        """(B, K) bool, the columns of the memory that each row sees.

        Args:
            visible: (B, P) bool, columns up to the end of the block that hold a position of the row.
            columns: K.
        """
        sees = in_place(self.seen[: len(visible) * columns].view(-1, columns))
        sees[:, : visible.shape[1]], sees[:, visible.shape[1] :] = visible, False
        return sees


class StaticLayer(RelayLayer):
    """A layer in the memory of a room: rows that stay move to the front."""

    def batch_select_indices(self, indices: Tensor) -> None:
        for held in self.memory or ():
            held[: len(indices)] = held[indices]
        self._hold(tuple(held[: len(indices)] for held in self.memory or ()), self.length)


class StaticPrefix(Prefix):
    """The committed text in the memory of a room; a forward writes its own keys and values there, too.

    Its length is always 0: what a forward sees is in its attention mask, so that no shape depends on the text.

    Args:
        memory: keys and values of each layer, (B, heads, C, width) each.
        seen: number of columns that a forward may see.
        block: the block in work.
    """

    can_replay = False
    is_in_place = True

    def __init__(self, memory: list[tuple[Tensor, Tensor]], seen: int, block: StaticBlock) -> None:
        super().__init__(
            [],
            0,
            before=block.before,
            read_out_before=block.read_out_before,
            is_one_block=True,
            is_aligned=True,
            masks=block.tokens.numel(),  # whatever the number is
        )
        self.memory = memory
        self.seen = seen
        self.columns = block.columns

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.memory[layer_idx]
        for held, states in ((keys, key_states), (values, value_states)):
            held.index_copy_(2, self.columns.to(held.device), states.to(held.dtype))
        return (keys, values) if self.shows_memory else (keys[:, :, : self.seen], values[:, :, : self.seen])

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen, 0


@dataclass
class Room:
    """Static memory for one `generate`.

    Args:
        block: the block in work, of R rows.
        memory: keys and values of each layer, (R, heads, C, width) each.
    """

    block: StaticBlock
    memory: list[tuple[Tensor, Tensor]]

    @property
    def size(self) -> tuple[int, int]:
        """R and C."""
        keys, _ = self.memory[0]
        return keys.shape[0], keys.shape[2]

    @classmethod
    def like(cls, model: Any, cache: RelayCache, rows: int, width: int, capacity: int) -> "Room":
        """New memory, for keys and values like those of the cache."""
        # No inference tensors, which could not be written outside of that mode.
        with torch.inference_mode(False):
            memory: Any = [
                tuple(
                    held.new_zeros(rows, capacity, held.shape[1], held.shape[3]).transpose(1, 2)
                    for held in layer.memory
                )
                for layer in cache.layers
            ]
            return cls(StaticBlock.empty(model, rows, width, capacity), memory)

    def fits(self, cache: RelayCache, rows: int, width: int, capacity: int) -> bool:
        """Whether so many rows and columns, and blocks of this width, find room; keys and values like the cache's."""
        kinds = [
            [(held.dtype, held.device, held.shape[1], held.shape[3]) for pair in pairs for held in pair]
            for pairs in (self.memory, [layer.memory for layer in cache.layers])
        ]
        most_rows, most_columns = self.size
        is_large = most_rows >= rows and most_columns >= capacity
        return kinds[0] == kinds[1] and is_large and self.block.tokens.shape[1] == width

    def move_in(self, cache: RelayCache) -> None:
        """Copies the committed keys and values here, where the cache then holds them."""
        layers: list[Any] = []
        for layer, memory in zip(cache.layers, self.memory, strict=True):
            rows, length = len(layer.keys), layer.length
            for held, committed in zip(memory, (layer.keys, layer.values), strict=True):
                held.zero_()  # what is hidden must still be finite
                held[:rows, :, :length] = committed
            keys, values = memory
            layers.append(StaticLayer.of((keys[:rows], values[:rows]), length))
        cache.layers = layers

    def move_out(self, cache: RelayCache) -> None:
        """Lets the cache hold its numbers in layers that may be copied, and leaves them here until then."""
        cache.layers = [RelayLayer.of(layer.memory, layer.length) for layer in cache.layers]

    def of_rows(self, rows: int) -> tuple[StaticBlock, list[tuple[Tensor, Tensor]]]:
        """Block and memory of the first rows."""
        memory: Any = [tuple(in_place(held[:rows]) for held in pair) for pair in self.memory]
        return self.block.of_rows(rows), memory


def in_place(tensor: Tensor) -> Tensor:
    """Lets compiled code rely on the address of a tensor, which it would otherwise copy for each replay of a graph."""
    torch._dynamo.mark_static_address(tensor)
    return tensor


class Rooms:
    """The static memory that a model keeps: one room, for the next `generate`.

    Graphs are replayed on the addresses that they were recorded with, so that new memory means to record them anew.

    Attributes:
        kept: the room, unless a `generate` is in it; `kept.clear()` gives the memory back.
    """

    def __init__(self) -> None:
        self.kept: list[Room] = []

    def take(self, model: Any, cache: RelayCache, rows: int, width: int, columns: int) -> Room:
        """A room for so many rows and columns, into which the cache moves; calls at the same time have one each."""
        capacity = coarse(columns, COLUMNS_AT_LEAST)
        try:
            room = self.kept.pop()  # at once, whatever other threads do
        except IndexError:
            room = Room.like(model, cache, rows, width, capacity)
        if not room.fits(cache, rows, width, capacity):
            most_rows, most_columns = room.size
            del room
            room = Room.like(model, cache, max(rows, most_rows), width, max(capacity, most_columns))
        room.move_in(cache)
        return room

    def give_back(self, room: Room) -> None:
        """Keeps the room for the next `generate`."""
        self.kept[:] = [room]

    def __reduce__(self) -> tuple[type["Rooms"], tuple[()]]:
        """Copies of a model, and saved ones, begin without."""
        return Rooms, ()
