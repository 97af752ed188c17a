"""How one denoising step of a rollout is computed. `rollout.py` knows only the protocol `Denoiser`.

In block diffusion a noisy block sees itself and the CLEAN blocks before it, and clean text never looks at noisy text.
The plain way to train that runs the doubled sequence [x_t ; x_0] in every step (`tests/trainers/rollouts/doubled.py`).
The block denoiser gives the same numbers for less:

1. the clean text runs once per rollout, in its first window, and its embeddings, keys and values are kept with their
   gradient;
2. given those, noisy blocks are independent, so a step runs only the blocks that still hold a mask. Blocks that are
   known have the clean pass's own states: same input, same attention;
3. only masked positions go through the head, in tiles that never hold all their logits.

If a rollout is differentiated in windows, all windows but the last see stand-ins of the clean pass, which collect its
gradient until the last window is differentiated.

A model without blocks has no clean half: its step is one pass over the noisy row.

Legend: B rows, L positions, S positions of a block, A active blocks of the row that has most, D hidden size,
V vocabulary, N masked positions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from ...modeling import RelayConfig
from ...modeling.attention_relay import align_to_positions
from ...modeling.channel_relay import in_scope
from ...modeling.outputs_relay import RelayOutput
from ...modeling.prefix_relay import denoise
from ...modeling.versions_relay import as_cache_argument
from .clean_text import CleanPrefix, CleanText
from .rows import RolloutRows, fit_positions


class StepResult(NamedTuple):
    """What one denoising step gives.

    Args:
        token_losses: (N,) fp32 cross-entropy at the masked positions, in row-major order.
        confidence: (N,) fp32 probability of the best token there.
        state: (B, L, D) position-aligned state the step leaves, or None.
    """

    token_losses: Tensor
    confidence: Tensor
    state: Tensor | None


class Denoiser(Protocol):
    """Denoises the rows of one rollout, step by step. Its construction runs no model."""

    config: RelayConfig

    def begin_window(self, is_last: bool) -> None:
        """Called before the steps of a window, which are differentiated together before the next window begins."""
        ...

    def step(self, rows: RolloutRows, state: Tensor | None, leaves_state: bool) -> StepResult:
        """One denoising step.

        Args:
            rows: with the masks as they are now.
            state: (B, L, D) position-aligned state to inject, or None for nothing.
            leaves_state: work out the state for the next step, too.
        """
        ...

    def predicted_state(self, rows: RolloutRows) -> Tensor:
        """The state that predictions of `rows` make, with nothing injected; (B, L, D), for a model whose channel reads
        distributions."""
        ...


def make_denoiser(
    model: Callable[..., Any], config: RelayConfig, rows: RolloutRows, clean_block_starts: bool = False
) -> Denoiser:
    """The denoiser for a model and the text of some rows.

    Args:
        model: a `RelayForMaskedDiffusion`, possibly wrapped by PEFT or DDP.
        config: its configuration.
        rows: whose text is denoised.
        clean_block_starts: with token shift, position 0 of a block is scored by the position before it. That is clean
            text in decoding, but the noisy block before in the published training; True trains what decoding does.
    """
    if config.block_size is None:
        return SequenceDenoiser(model, config)
    return BlockDenoiser(model, config, rows, clean_block_starts)


def receives_state(config: RelayConfig, rows: RolloutRows) -> Tensor:
    """(B, L) bool, positions that the state enters; a row that starts from "none" gets it from its second step on.

    [MASK]s that only fill up the last block are among them, as in decoding.
    """
    receives = in_scope(config, rows.noisy_ids(config.mask_token_id) == config.mask_token_id)
    return receives & rows.has_state[:, None] if config.relay_initial_state == "none" else receives


class SequenceDenoiser:
    """Whole-sequence models: every position sees every other."""

    def __init__(self, model: Callable[..., Any], config: RelayConfig) -> None:
        self.model = model
        self.config = config

    def begin_window(self, is_last: bool) -> None:
        """Steps share nothing but the state."""

    def step(self, rows: RolloutRows, state: Tensor | None, leaves_state: bool) -> StepResult:
        output = self._forward(rows, state, rows.masked, targets=rows.clean_ids, leaves_state=leaves_state)
        return StepResult(output.token_losses, output.confidence, output.relay_state)

    def predicted_state(self, rows: RolloutRows) -> Tensor:
        return self._forward(rows, None, None).relay_state

    def _forward(self, rows: RolloutRows, state: Tensor | None, scored: Tensor | None, **scoring: Any) -> RelayOutput:
        ids, receives = rows.noisy_ids(self.config.mask_token_id), receives_state(self.config, rows)
        return denoise(
            self.model, ids, None, state, scored, receives=receives, attention_mask=rows.attention_mask, **scoring
        )


class PackedBlocks:
    """The blocks that still hold a mask, side by side in each row.

    Args:
        masked: (B, L') bool, L' a multiple of S.
        size: S.

    Attributes:
        is_masked: (B, A * S) bool, `masked` packed.
        columns: (B, A * S) where packed positions come from. Rows with fewer active blocks repeat inactive ones, whose
            results are not read.
        is_active: (B, A * S) bool, packed positions of active blocks.
        active_columns: (B, L') bool, the same before packing.
        last: index of the last active block of all rows.
    """

    def __init__(self, masked: Tensor, size: int) -> None:
        active = masked.view(len(masked), -1, size).any(-1)  # (B, blocks)
        # Active blocks first, in their order.
        count = max(int(active.sum(-1).max()), 1)
        blocks = active.long().argsort(dim=-1, descending=True, stable=True)[:, :count]  # (B, A)
        self.columns = (blocks[..., None] * size + torch.arange(size, device=blocks.device)).flatten(1)
        self.is_active = active.gather(1, blocks).repeat_interleave(size, dim=1)
        self.active_columns = active.repeat_interleave(size, dim=1)
        self.last = int(blocks.where(active.gather(1, blocks), 0).max())
        self._row = torch.arange(len(blocks), device=blocks.device)[:, None]  # (B, 1)
        self.is_masked = self.pack(masked)

    def pack(self, tensor: Tensor) -> Tensor:
        """(B, L', ...) -> (B, A * S, ...)."""
        return tensor[self._row, self.columns]  # `gather` would keep the whole tensor for the backward pass

    def unpack(self, packed: Tensor, known: Tensor) -> Tensor:
        """(B, A * S, ...) -> (B, L', ...): what is packed, and in blocks that are not what is `known`."""
        columns = self.active_columns.view(*self.active_columns.shape, *[1] * (packed.ndim - 2))
        return known.masked_scatter(columns, packed[self.is_active].to(known.dtype))


class BlockDenoiser:
    """Block diffusion: one clean pass, then noisy passes over the active blocks, packed side by side in each row.

    Every step is one pass, even if no block is active, so that processes which train together stay in step.
    """

    def __init__(
        self, model: Callable[..., Any], config: RelayConfig, rows: RolloutRows, clean_block_starts: bool = False
    ) -> None:
        self.model = model
        self.config = config
        self.clean_block_starts = clean_block_starts
        self.size: int = config.block_size
        self.length = rows.clean_ids.shape[1]
        self.is_text = self._pad(rows.attention_mask)  # (B, L') with L' a multiple of S
        self.clean_ids = self._pad(rows.clean_ids)
        self.positions = torch.arange(self.is_text.shape[1], device=self.is_text.device)[None]
        # The first window fills the clean pass; every window sets what its steps see of it.
        self.clean_pass: CleanText | None = None
        self.clean_losses: Tensor | None = None
        self.stand_in: CleanText | None = None
        self.clean: CleanText | None = None
        self.clean_hidden: Tensor | None = None
        self.edge: Tensor | None = None

    def _run_clean_pass(self) -> tuple[CleanText, Tensor]:
        """Looks up the embeddings of the whole rollout, too: the last column is a [MASK] that no position attends to.

        Returns:
            What the pass leaves, and the (0,) losses of no position, which are part of its graph.
        """
        clean = CleanText()
        width = self.clean_ids.shape[1] + 1
        ids = torch.cat([self.clean_ids, torch.full_like(self.clean_ids[:, :1], self.config.mask_token_id)], dim=1)
        output = self.model(
            input_ids=ids,
            attention_mask=None if bool(self.is_text.all()) else fit_positions(self.is_text, width),
            position_ids=self._existing(torch.arange(width, device=ids.device)[None]),
            cache=clean,
            logits_to_keep=torch.empty(0, dtype=torch.long, device=ids.device),
            targets=ids,
            output_relay_state=False,
        )
        # Under autocast, accelerate turns every output of a wrapped model into fp32, whatever the backbone's dtype.
        clean.embeds = output.inputs_embeds.to(clean.hidden.dtype)
        return clean, output.token_losses

    def begin_window(self, is_last: bool) -> None:
        """The first window runs the clean pass, the last one carries the gradient of all windows into it."""
        if self.clean_pass is None:
            self.clean_pass, self.clean_losses = self._run_clean_pass()
        if is_last:
            self.clean = self.clean_pass
            # A zero that ties this window to the clean pass, so that its backward always runs, and from its output on.
            # FSDP gathers weights there: the head's, too, which share a group with those of the last norm.
            self.edge = self.clean_losses.sum()
        else:
            self.stand_in = self.stand_in or self.clean_pass.stand_in()
            self.clean = self.stand_in
            self.edge = torch.zeros((), device=self.clean_ids.device)
        hidden = self.clean.hidden[:, :-1]
        self.clean_hidden = align_to_positions(hidden, self.positions) if self.config.token_shift else hidden

    def step(self, rows: RolloutRows, state: Tensor | None, leaves_state: bool) -> StepResult:
        blocks = PackedBlocks(self._pad(rows.masked), self.size)
        targets, scored = blocks.pack(self.clean_ids), blocks.is_masked & blocks.is_active
        receives = None
        if state is not None:
            state = blocks.pack(self._pad(state))
            receives = blocks.pack(self._pad(receives_state(self.config, rows)))
        output = self._forward(blocks, state, scored, receives=receives, targets=targets, leaves_state=leaves_state)
        state = output.relay_state[:, : self.length] if leaves_state else None
        return StepResult(output.token_losses + self.edge, output.confidence, state)

    def predicted_state(self, rows: RolloutRows) -> Tensor:
        blocks = PackedBlocks(self._pad(rows.masked), self.size)
        return self._forward(blocks, None, None).relay_state[:, : self.length]

    def _forward(
        self, blocks: PackedBlocks, state: Tensor | None, scored: Tensor | None, **scoring: Any
    ) -> RelayOutput:
        """Runs packed blocks behind the clean text before each; arguments of `denoise`, packed."""
        before = blocks.pack(self.clean_hidden) if self.config.token_shift else None
        whole_rows = partial(self._whole_rows, blocks)
        takes_before = self._takes_before(blocks.columns)
        prefix = CleanPrefix(self.clean, blocks.last * self.size, before, takes_before, whole_rows)
        return denoise(
            self.model,
            blocks.pack(self.clean_ids).masked_fill(blocks.is_masked, self.config.mask_token_id),
            prefix,
            state,
            scored,
            attention_mask=self._attention(blocks.columns, blocks.pack(self.is_text), prefix),
            position_ids=self._existing(blocks.columns),
            inputs_embeds=torch.where(
                blocks.is_masked[..., None], self.clean.embeds[:, -1:], blocks.pack(self.clean.embeds)
            ),
            **scoring,
        )

    def _whole_rows(
        self, blocks: PackedBlocks, raw: Tensor, head_inputs: Tensor, is_masked: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a channel reads of whole rows: active blocks as the pass saw them, known blocks as the clean pass did.

        Args:
            blocks: what the pass ran.
            raw: (B, A * S, D) its outputs that the channel reads, before they are aligned.
            head_inputs: (B, A * S, D) aligned.
            is_masked: (B, A * S) bool.
        """
        clean = self.clean.read_out[:, :-1]
        read_out = blocks.unpack(raw, clean)
        if self.config.token_shift:
            before = align_to_positions(clean, self.positions) if self.clean_block_starts else None
            read_out = align_to_positions(read_out, self.positions, before, self._takes_before(self.positions))
        nothing = torch.zeros_like(blocks.active_columns)
        return read_out, blocks.unpack(head_inputs, self.clean_hidden), blocks.unpack(is_masked, nothing)

    def _takes_before(self, positions: Tensor) -> Tensor | None:
        """(B, L) bool, block starts that read the clean text before the block; None unless `clean_block_starts`."""
        return positions % self.size == 0 if self.clean_block_starts else None

    def _attention(self, columns: Tensor, is_text: Tensor, prefix: CleanPrefix) -> Any:
        """A packed position sees its own block, and the clean text of the blocks before it."""
        length = prefix.get_seq_length()
        block = columns // self.size  # (B, A*S)
        clean_block = self.positions[:, :length].expand(len(block), -1) // self.size
        key_block = torch.cat([clean_block, block], dim=1)
        is_noisy = torch.arange(key_block.shape[1], device=block.device) >= length

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            here = block[row, query - length]
            return torch.where(is_noisy[key], key_block[row, key] == here, key_block[row, key] < here)

        return create_bidirectional_mask(
            self.config.text_config,
            # Stands for the embeddings, of which only shape and device matter here.
            torch.empty(*block.shape, 0, device=block.device),
            torch.cat([self.is_text[:, :length], is_text], dim=1),
            **as_cache_argument(prefix),
            and_mask_function=sees,
        )

    def _existing(self, positions: Tensor) -> Tensor:
        """No text looks at what fills up the blocks, so it takes no position that a table may not have."""
        return positions.minimum(self.is_text.sum(-1).amax() - 1)

    def _pad(self, tensor: Tensor) -> Tensor:
        """Pads the positions, the second axis, to whole blocks."""
        return fit_positions(tensor, -(-self.length // self.size) * self.size)
