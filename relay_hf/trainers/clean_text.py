"""The clean pass of a rollout, and what noisy blocks see of it; see `denoiser.py`.

Legend: B rows, A active blocks, S positions of a block, D hidden size.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..modeling import RelayCache


class CleanText(RelayCache):
    """What the clean pass leaves, with its gradient: embeddings, keys, values and raw outputs.

    Written once: gradient checkpointing replays the pass during backward, and must then see what it saw the first time.
    """

    survives_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.embeds: Tensor | None = None
        self.hidden: Tensor | None = None
        self.read_out: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == len(self.layers):
            self.layers.append(_filled_layer(key_states, value_states))
        return key_states, value_states

    def record(self, input_ids: Tensor, hidden: Tensor, read_out: Tensor) -> None:
        self.hidden, self.read_out = hidden, read_out

    def stand_in(self) -> "CleanText":
        """The same numbers cut off from the clean pass; their gradient reaches it when it is differentiated itself."""
        other = CleanText()
        other.embeds, other.hidden, other.read_out = map(_stand_in, (self.embeds, self.hidden, self.read_out))
        source: Any
        for source in self.layers:
            other.layers.append(_filled_layer(_stand_in(source.keys), _stand_in(source.values)))
        return other


def _stand_in(tensor: Tensor) -> Tensor:
    leaf = tensor.detach().requires_grad_(tensor.requires_grad)
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: gradient if leaf.grad is None else gradient + leaf.grad)
    return leaf


def _filled_layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer


class CleanPrefix(RelayCache):
    """What a noisy pass sees of the clean text; read-only.

    Args:
        clean: the clean pass.
        length: only that many positions are looked at.
        before: (B, A * S, D) input of the head at the position before each packed one; None without token shift.
        whole_rows: makes of what the pass leaves of its blocks, what a channel reads of the rows that they are part of.
    """

    survives_checkpointing = True

    def __init__(
        self, clean: CleanText, length: int, before: Tensor | None, whole_rows: Callable[..., tuple[Tensor, ...]]
    ) -> None:
        super().__init__()
        self.is_drafting = True
        self.whole_rows = whole_rows
        # The channel reads raw outputs, those of known blocks included, so only the head needs aligning.
        self.last_hidden = before
        self.read_out: Tensor | None = None
        source: Any
        for source in clean.layers:
            self.layers.append(_filled_layer(source.keys[..., :length, :], source.values[..., :length, :]))

    def record(self, input_ids: Tensor, hidden: Tensor, read_out: Tensor) -> None:
        self.read_out = read_out

    def rows_for_channel(
        self, read_out: Tensor, head_inputs: Tensor, is_masked: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        whole, head_inputs, is_masked = self.whole_rows(self.read_out, head_inputs, is_masked)
        return whole, head_inputs, is_masked
