"""The plain doubled-sequence step, oracle of the block denoiser: [x_t ; x_0] in every step, as published.

Like the published one it computes the logits of every noisy position, and the softmax of all of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask

from relay_hf import RelayConfig
from relay_hf.trainers.denoiser import Step, receives_state
from relay_hf.trainers.rows import RolloutRows


class DoubledDenoiser:
    """A noisy position sees its noisy block and the clean blocks before it; a clean one, clean blocks up to its own."""

    scores_all = True

    def __init__(self, model: Callable[..., Any], config: RelayConfig, rows: RolloutRows, *_: Any) -> None:
        self.model, self.config = model, config
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

    def step(self, rows: RolloutRows, state: Tensor | None) -> Step:
        length = rows.clean_ids.shape[1]
        masked = rows.masked
        scored = torch.ones_like(masked) if self.scores_all else masked
        receives = None
        if state is not None:
            # The clean half is committed text, and so is a block without masks: neither gets a state.
            size = self.config.block_size
            blocks = F.pad(masked, (0, -length % size)).view(len(masked), -1, size).any(-1)
            is_open = blocks.repeat_interleave(size, dim=1)[:, :length]
            receives = F.pad(receives_state(self.config, rows) & is_open, (0, length))
            state = F.pad(state, (0, 0, 0, length))
        output = self.model(
            input_ids=torch.cat([rows.noisy_ids(self.config.mask_token_id), rows.clean_ids], dim=1),
            attention_mask=self.attention_mask,
            position_ids=self.position_ids[None],
            relay_state=state,
            relay_mask=receives,
            logits_to_keep=F.pad(scored, (0, length)),
            use_cache=False,
        )
        next_state = None if output.relay_state is None else output.relay_state[:, :length]
        logits = output.logits.float()  # (N, V) with N the number of scored positions
        losses = F.cross_entropy(logits, rows.clean_ids[scored], reduction="none")
        probability = logits.detach().softmax(-1)
        probability[:, self.config.mask_token_id] = 0.0
        return Step(losses[masked[scored]], probability.amax(-1)[masked[scored]], next_state)


class FrugalDoubledDenoiser(DoubledDenoiser):
    """Only masked positions go through the head."""

    scores_all = False
