"""The clean pass of a rollout, and what noisy blocks see of it; see `denoiser.py`.

Legend: B rows, A active blocks, S positions of a block, D hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ...modeling.prefix_relay import Prefix


class CleanText(Prefix):
    """What the clean pass leaves, with its gradient: embeddings, keys, values and raw outputs. It sees nothing before.

    Written once: gradient checkpointing replays the pass during backward, and must then see what it saw the first time.

    Args:
        mask_token_id: whose embedding is looked up, too.

    Attributes:
        embeds: (B, L, D) embeddings of the text.
        mask_embeds: (B, 1, D) embedding of [MASK].
    """

    def __init__(self, mask_token_id: int) -> None:
        super().__init__([], 0)
        self.mask_token_id = mask_token_id
        self.embeds: Tensor | None = None
        self.mask_embeds: Tensor | None = None

    def look_up(self, embeddings: nn.Module, input_ids: Tensor) -> Tensor:
        """Looks up all that the rollout needs at once: the gradient of a lookup is as large as the vocabulary."""
        mask = torch.full_like(input_ids[:, :1], self.mask_token_id)
        looked_up = embeddings(torch.cat([input_ids, mask], dim=1))
        self.embeds, self.mask_embeds = looked_up[:, :-1], looked_up[:, -1:]
        return self.embeds

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == len(self.layers):
            self.layers.append(_filled_layer(key_states, value_states))
        return key_states, value_states

    def stand_in(self) -> "CleanText":
        """A detached copy; gradients collect in its leaves, and are added when the clean pass is differentiated."""
        other = CleanText(self.mask_token_id)
        for name in ("embeds", "mask_embeds", "hidden", "read_out"):
            setattr(other, name, _stand_in(getattr(self, name)))
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


class CleanPrefix(Prefix):
    """What a noisy pass over packed blocks sees of the clean text.

    Args:
        clean: the clean pass.
        length: positions of it that the pass sees.
        before: (B, A * S, D) input of the head at the position before each packed one; None without token shift.
        takes_before: (B, A * S) bool, positions that use it whatever is in the column before; None = no others.
        masks: how many [MASK]s the rows show that a channel reads.
        whole_rows: makes of what the pass leaves of its blocks, what a channel reads of the rows that they are part of.
    """

    def __init__(
        self,
        clean: CleanText,
        length: int,
        before: Tensor | None,
        takes_before: Tensor | None,
        masks: int,
        whole_rows: Callable[..., tuple[Tensor, ...]],
    ) -> None:
        # The channel reads raw outputs, those of known blocks included, so only the head needs aligning.
        super().__init__(clean.layers, length, before=before, takes_before=takes_before, masks=masks)
        self.whole_rows = whole_rows

    def rows_for_channel(
        self, read_out: Tensor, head_inputs: Tensor, is_masked: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        whole, head_inputs, is_masked = self.whole_rows(self.read_out, head_inputs, is_masked)
        return whole, head_inputs, is_masked
