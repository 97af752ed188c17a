"""Prefix: the text that one forward sees before its own positions, and the raw outputs of the forward.

Decoding, training and the likelihood make a prefix for each forward; `denoise` is the forward that all three share.

Legend: B rows, P positions of the prefix, L positions of the forward, D hidden size, N scored positions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .outputs_relay import RelayOutput


class Prefix(Cache):
    """Read-only keys and values of earlier text, made for one forward.

    Args:
        layers: layers of a cache, with `keys` and `values` (B or 1, heads, >= P, width); one row serves any number.
        length: P, number of their positions that the forward sees.
        rows: (B or 1,) the row of `layers` that each row of the forward sees; None = their rows in their order.
        before: (B or 1, 1 or L, D) raw inputs of the head at predecessors that are not in the column before, with which
            a token-shift model aligns its outputs; None = there are none.
        read_out_before: the raw hidden states that the channel reads at these predecessors.
        takes_before: (B, L) bool, positions that use `before` although their predecessor is in the column before.
        is_one_block: whether all new positions are of one block, so that each sees all the others.
        is_aligned: whether blocks begin at the same columns in all rows, and each row's text is one run of columns.
        masks: how many [MASK]s are among the new positions, at most; None = a channel that has to know waits for the
            device.

    Attributes:
        can_replay: whether gradient checkpointing may run the forward a second time.
        is_in_place: whether keys and values of the forward are written behind those of the prefix.
        shows_memory: whether `update` returns what it holds of all rows and of room for more columns; if in place.
        hidden: (B, L, D) raw inputs of the head, None before the forward has run.
        read_out: (B, L, D) raw hidden states that the channel reads, likewise; neither is position-aligned.
    """

    can_replay = True
    is_in_place = False

    def __init__(
        self,
        layers: list[Any],
        length: int,
        *,
        rows: Tensor | None = None,
        before: Tensor | None = None,
        read_out_before: Tensor | None = None,
        takes_before: Tensor | None = None,
        is_one_block: bool = False,
        is_aligned: bool = False,
        masks: int | None = None,
    ) -> None:
        super().__init__(layers=layers)
        self.length = length
        self.rows = rows
        self.before = before
        self.read_out_before = read_out_before
        self.takes_before = takes_before
        self.is_one_block = is_one_block
        self.is_aligned = is_aligned
        self.shows_memory = False
        self.masks = masks
        self.hidden: Tensor | None = None
        self.read_out: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix and of the new positions; the new ones are not stored."""
        if self.length == 0:
            return key_states, value_states
        layer: Any = self.layers[layer_idx]
        return self._joined(layer.keys, key_states), self._joined(layer.values, value_states)

    def _joined(self, held: Any, new: Tensor) -> Tensor:
        seen = rows_of(held[:, :, : self.length], self.rows)
        return torch.cat([seen.expand(len(new), -1, -1, -1), new], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def check_rows(self, count: int) -> None:
        """Raise a ValueError if a forward over `count` rows cannot run behind the prefix."""

    def take(self, hidden: Tensor, read_out: Tensor) -> None:
        """Stores the raw outputs of the forward, (B, L, D) each."""
        self.hidden, self.read_out = hidden, read_out

    def look_up(self, embeddings: nn.Module, input_ids: Tensor) -> Tensor:
        """(B, L, D) embeddings of (B, L) tokens."""
        return embeddings(input_ids)

    def rows_for_channel(
        self, read_out: Tensor, head_inputs: Tensor, is_masked: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rows that a channel makes a state of: those of the forward, unless it ran only a part of each row.

        Args:
            read_out: (B, L, D), position-aligned, as are the following ones.
            head_inputs: (B, L, D).
            is_masked: (B, L) bool, where the input was [MASK].
        """
        return read_out, head_inputs, is_masked


class OtherCache(Prefix):
    """A cache of transformers as a prefix: the forward stores its keys and values there, and nothing else.

    Args:
        cache: any cache that the backbone takes.
    """

    can_replay = False

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache.layers, cache.get_seq_length())
        self.cache = cache

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.cache.update(*args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.cache.get_mask_sizes(query_length, layer_idx)


def rows_of(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """The rows with these indices, (n,); None = all."""
    return tensor if rows is None else tensor.index_select(0, rows)


def denoise(
    model: Any,
    input_ids: Tensor,
    prefix: Prefix | None,
    state: Tensor | None,
    scored: Tensor | tuple[Tensor, Tensor] | None,
    *,
    receives: Tensor | None = None,
    targets: Tensor | None = None,
    z_loss: float = 0.0,
    leaves_state: bool = True,
    **inputs: Any,
) -> RelayOutput:
    """Runs one denoise forward: noisy positions behind clean text, with the state that the step before left.

    Args:
        model: a `RelayForMaskedDiffusion`, possibly wrapped (PEFT, DDP).
        input_ids: (B, L) tokens, some of them [MASK].
        prefix: the clean text before them; None = there is none.
        state: (B, L, width) position-aligned state to inject; None = nothing.
        scored: positions to score: (B, L) bool, or rows and columns, (N,) each; None = none.
        receives: (B, L) bool, positions that the state enters; None = those of `config.relay_scope`.
        targets: (B, L) tokens whose losses to return; None = return the head's inputs.
        z_loss: of the model's `forward`.
        leaves_state: make the state for the next step.
        inputs: `attention_mask`, `position_ids` and `inputs_embeds` of the model's `forward`.

    Returns:
        `head_inputs`, (N, D), of the scored positions, or their `token_losses` and `confidence`, (N,) each; and
        `relay_state`.
    """
    return model(
        input_ids,
        cache=prefix,
        relay_state=state,
        relay_mask=None if state is None else receives,
        logits_to_keep=input_ids.new_empty(0) if scored is None else scored,
        targets=targets,
        z_loss=z_loss,
        unscored=targets is None,
        output_relay_state=leaves_state,
        use_cache=False,
        **inputs,
    )
