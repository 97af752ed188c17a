"""RelayCache: everything that decoding remembers, in one object, so that rows can come and go together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class RelayCache(DynamicCache):
    """Keys and values of committed blocks, plus the relay state of the block that is being denoised.

    Three things live beside the keys and values, each with the rows as first axis:

    - `relay_state`: (B, block, D), state of the current block, or None before its first denoising step;
    - `last_hidden`: (B, 1, D), input of the head at the last committed position;
    - `last_read_out`: (B, 1, D), what the channel reads at the last committed position.

    The last two let a token-shift model align position 0 of the next block, whose logits and state are those that the
    position before it produced.
    """

    # Whether gradient checkpointing may replay a forward with this cache.
    survives_checkpointing = False
    # (B, L) bool, new positions that are aligned with `last_hidden` although their predecessor is in the column before.
    is_cut: Tensor | None = None
    _ROW_TENSORS = ("relay_state", "last_hidden", "last_read_out")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.relay_state: Tensor | None = None
        self.last_hidden: Tensor | None = None
        self.last_read_out: Tensor | None = None
        self.is_drafting = False

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Forwards inside see the committed prefix and their own block, and leave nothing behind."""
        self.is_drafting = True
        try:
            yield
        finally:
            self.is_drafting = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns keys and values of the prefix and the new positions; stores the new ones unless drafting."""
        if not self.is_drafting:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.get_seq_length(layer_idx) == 0:
            return key_states, value_states
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)

    def write_relay_state(self, state: Tensor | None, rows: Tensor) -> None:
        """Stores `state` (B, block, D) for the chosen `rows` (B,) bool; the others keep theirs.

        A row that merely waits for its neighbours keeps its state, so that no row depends on who shares its batch.
        """
        if self.relay_state is None or state is None:
            self.relay_state = state
        else:
            self.relay_state = torch.where(rows[:, None, None], state, self.relay_state.to(state.dtype))

    def record(self, hidden: Tensor, read_out: Tensor) -> None:
        """Takes the raw outputs of a forward, both (B, L, D): input of the head, and what the channel reads.

        A commit keeps their last position and drops the block's state; a draft leaves nothing.
        """
        if not self.is_drafting:
            # Copies: views would keep the outputs of a whole prefill alive.
            self.last_hidden, self.last_read_out = (raw[:, -1:].detach().clone() for raw in (hidden, read_out))
            self.relay_state = None

    def reset(self) -> None:
        super().reset()
        self._forget_rows()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` committed positions (a number <= 0, as in transformers).

        What was remembered of the last position goes with it: a token-shift model then asks for a fresh prefill.
        """
        super().crop(tokens_to_remove)
        if tokens_to_remove < 0:
            self._forget_rows()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda tensor: tensor[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _forget_rows(self) -> None:
        for name in self._ROW_TENSORS:
            setattr(self, name, None)

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        for name in self._ROW_TENSORS:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, function(tensor))
