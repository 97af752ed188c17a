"""The plain doubled-sequence step, oracle of the block denoiser: [x_t ; x_0] in every step, as published.

Like the published one it computes the logits of every noisy position, shifts logits and states by one if the model has
a token shift, and takes the softmax of all of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask

from relay_hf import RelayConfig
from relay_hf.trainers.rollouts.denoiser import StepResult, receives_state
from relay_hf.trainers.rollouts.rows import RolloutRows


class DoubledDenoiser:
    """A noisy position sees its noisy block and the clean blocks before it; a clean one, clean blocks up to its own."""

    def __init__(self, model: Callable[..., Any], config: RelayConfig, rows: RolloutRows, *_: Any) -> None:
        self.model, self.config, self.token_shift = model, config, config.token_shift
        count, length = rows.clean_ids.shape
        self.position_ids = torch.arange(length).repeat(2)  # (2L,)
        block, is_noisy = self.position_ids // config.block_size, torch.arange(2 * length) < length

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same, before = block[key] == block[query], block[key] < block[query]
            return torch.where(is_noisy[key], is_noisy[query] & same, before | (same & ~is_noisy[query]))

        self.attention_mask = create_bidirectional_mask(
            config.text_config,
            torch.empty(count, 2 * length, 0),
            rows.attention_mask.repeat(1, 2),
            and_mask_function=sees,
        )

    def begin_window(self, is_last: bool) -> None:
        """Every step has its own clean half."""

    def step(self, rows: RolloutRows, state: Tensor | None, leaves_state: bool) -> StepResult:
        length = rows.clean_ids.shape[1]
        with self._raw_outputs():
            output = self.model(**self._inputs(rows, state), logits_to_keep=torch.arange(length))
        next_state = self._shift(output.relay_state[:, :length]) if leaves_state else None
        losses, confidence = self._score(self._shift(output.logits).float(), rows)
        return StepResult(losses.where(rows.masked, 0.0), confidence.where(rows.masked, 0.0), next_state)

    def _inputs(self, rows: RolloutRows, state: Tensor | None) -> dict[str, Any]:
        length = rows.clean_ids.shape[1]
        receives = None
        if state is not None:
            # The clean half is committed text, and so is a block without masks: neither gets a state.
            size = self.config.block_size
            blocks = F.pad(rows.masked, (0, -length % size)).view(len(rows), -1, size).any(-1)
            is_open = blocks.repeat_interleave(size, dim=1)[:, :length]
            receives = F.pad(receives_state(self.config, rows) & is_open, (0, length))
            state = F.pad(state, (0, 0, 0, length))
        return {
            "input_ids": torch.cat([rows.noisy_ids(self.config.mask_token_id), rows.clean_ids], dim=1),
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids[None],
            "relay_state": state,
            "relay_mask": receives,
            "use_cache": False,
        }

    def _score(self, logits: Tensor, rows: RolloutRows) -> tuple[Tensor, Tensor]:
        """(B, L) losses and (B, L) confidences of (B, L, V) logits."""
        losses = F.cross_entropy(logits.flatten(0, 1), rows.clean_ids.flatten(), reduction="none")
        probability = logits.detach().softmax(-1)
        probability[..., self.config.mask_token_id] = 0.0
        return losses.view(rows.clean_ids.shape), probability.amax(-1)

    def _shift(self, raw: Tensor) -> Tensor:
        return torch.cat([raw[:, :1], raw[:, :-1]], dim=1) if self.token_shift else raw

    @contextmanager
    def _raw_outputs(self) -> Iterator[None]:
        """The model leaves the token shift to us."""
        self.config.token_shift = False
        try:
            yield
        finally:
            self.config.token_shift = self.token_shift


class PublishedDenoiser(DoubledDenoiser):
    """Computes one more loss, over all labels, which is not used: the published code passes the labels along."""

    def _score(self, logits: Tensor, rows: RolloutRows) -> tuple[Tensor, Tensor]:
        labels = rows.clean_ids.where(rows.learned, -100)
        self.unused = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return super()._score(logits, rows)
