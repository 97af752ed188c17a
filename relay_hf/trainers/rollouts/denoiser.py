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

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from ...modeling import RelayConfig
from ...modeling.attention_blocks_relay import BLOCK_ATTENTION
from ...modeling.attention_packed_relay import dense_mask, packed_pattern
from ...modeling.attention_relay import align_to_positions
from ...modeling.channel_relay import in_scope
from ...modeling.outputs_relay import RelayOutput
from ...modeling.prefix_relay import Prefix, denoise
from ...modeling.versions_relay import as_cache_argument
from .clean_text import CleanPrefix, CleanText
from .rows import RolloutRows, fit_positions

FLEX_TILE = 128  # positions of a tile of FlexAttention, whatever the kernel's own tiles are
Places = tuple[Tensor, Tensor]  # rows and columns, (N,) each


class StepResult(NamedTuple):
    """What one denoising step gives.

    Args:
        losses: (B, L) fp32 cross-entropy at the masked positions, 0 at all others.
        confidence: (B, L) fp32 probability of the best token there, 0 at all others.
        state: (B, L, D) position-aligned state the step leaves, or None.
    """

    losses: Tensor
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
    model: Callable[..., Any],
    config: RelayConfig,
    rows: RolloutRows,
    clean_block_starts: bool = False,
    z_loss: float = 0.0,
) -> Denoiser:
    """The denoiser for a model and the text of some rows.

    Args:
        model: a `RelayForMaskedDiffusion`, possibly wrapped by PEFT or DDP.
        config: its configuration.
        rows: whose text is denoised.
        clean_block_starts: with token shift, position 0 of a block is scored by the position before it. That is clean
            text in decoding, but the noisy block before in the published training; True trains what decoding does.
        z_loss: how much of log(sum(exp(logits)))^2 each loss includes.
    """
    if config.block_size is None:
        return SequenceDenoiser(model, config, z_loss)
    return BlockDenoiser(model, config, rows, clean_block_starts, z_loss)


def receives_state(config: RelayConfig, rows: RolloutRows) -> Tensor:
    """(B, L) bool, positions that the state enters; a row that starts from "none" gets it from its second step on.

    [MASK]s that only fill up the last block are among them, as in decoding.
    """
    receives = in_scope(config, rows.noisy_ids(config.mask_token_id) == config.mask_token_id)
    return receives & rows.has_state[:, None] if config.relay_initial_state == "none" else receives


def places_of(chosen: Tensor, count: int) -> Places:
    """Rows and columns of the True entries of (B, L), in row-major order; their number is given, so nothing waits."""
    rows, columns = torch.nonzero_static(chosen, size=count).unbind(-1)
    return rows, columns


def spread(numbers: Tensor, places: Places, like: Tensor) -> Tensor:
    """(N,) numbers of the positions at (N,) rows and (N,) columns -> (B, L), the shape of `like`, 0 at all others."""
    return numbers.new_zeros(like.shape).index_put(places, numbers)


class SequenceDenoiser:
    """Whole-sequence models: every position sees every other. A step waits for the device once."""

    def __init__(self, model: Callable[..., Any], config: RelayConfig, z_loss: float = 0.0) -> None:
        self.model = model
        self.config = config
        self.z_loss = z_loss

    def begin_window(self, is_last: bool) -> None:
        """Steps share nothing but the state."""

    def step(self, rows: RolloutRows, state: Tensor | None, leaves_state: bool) -> StepResult:
        sizes = SequenceSizes(rows, self.config.mask_token_id)
        places = places_of(rows.masked, sizes.scored)
        scoring = {"targets": rows.clean_ids, "z_loss": self.z_loss, "leaves_state": leaves_state}
        output = self._forward(rows, sizes, state, places, **scoring)
        losses, confidence = (spread(n, places, rows.masked) for n in (output.token_losses, output.confidence))
        return StepResult(losses, confidence, output.relay_state)

    def predicted_state(self, rows: RolloutRows) -> Tensor:
        return self._forward(rows, SequenceSizes(rows, self.config.mask_token_id), None, None).relay_state

    def _forward(
        self, rows: RolloutRows, sizes: "SequenceSizes", state: Tensor | None, scored: Places | None, **scoring: Any
    ) -> RelayOutput:
        return denoise(
            self.model,
            rows.noisy_ids(self.config.mask_token_id),
            Prefix([], 0, is_one_block=True, is_aligned=True, masks=sizes.masks),
            state,
            scored,
            receives=receives_state(self.config, rows),
            attention_mask=rows.attention_mask if sizes.is_padded else None,
            **scoring,
        )


class SequenceSizes:
    """What the host has to know of whole rows before a step; to find out waits for the device once.

    Attributes:
        scored: number of masked positions.
        masks: number of positions that show [MASK].
        is_padded: whether a row has padding.
    """

    def __init__(self, rows: RolloutRows, mask_token_id: int) -> None:
        shown = rows.noisy_ids(mask_token_id) == mask_token_id
        numbers = rows.masked.sum(), shown.sum(), (~rows.attention_mask).sum()
        self.scored, self.masks, self.is_padded = torch.stack(numbers).tolist()


def rounded_up(number: int, unit: int) -> int:
    """The multiple of `unit` that is not below the number, and nearest to it."""
    return -(-number // unit) * unit


class PackedBlocks:
    """The blocks that still hold a mask, side by side in each row. To pack them waits for the device once.

    Args:
        masked: (B, L') bool, L' a multiple of `unit`.
        shown: (B, L') bool, where the text shows [MASK].
        size: S.
        unit: a multiple of S, to multiples of which A * S and the clean text that the blocks see are rounded up.

    Attributes:
        is_masked: (B, A * S) bool, `masked` packed.
        columns: (B, A * S) where packed positions come from. Rows with fewer active blocks are filled up with inactive
            ones, whose results are not read.
        is_active: (B, A * S) bool, packed positions of active blocks.
        seen: columns of the clean text, behind which no active block begins.
        masks: how many [MASK]s the active blocks show.
        scored: rows and packed columns, (N,) each, of the masked positions.
        places: rows and columns, (N,) each, of the same positions before packing.
    """

    def __init__(self, masked: Tensor, shown: Tensor, size: int, unit: int) -> None:
        active = masked.view(len(masked), -1, size).any(-1)  # (B, blocks)
        last = (active * torch.arange(active.shape[1], device=masked.device)).max()
        # All that the host has to know of a step, in one transfer; with these sizes, nothing else waits.
        masks = (shown.view(*active.shape, size) & active[..., None]).sum()
        count, last, total, self.masks = torch.stack([active.sum(-1).max(), last, masked.sum(), masks]).tolist()
        self.seen = rounded_up(last * size, unit)
        width = rounded_up(max(count, 1) * size, unit)
        # Active blocks first, in their order.
        blocks = active.long().argsort(dim=-1, descending=True, stable=True)[:, : width // size]  # (B, A)
        self.columns = (blocks[..., None] * size + torch.arange(size, device=blocks.device)).flatten(1)
        self.is_active = active.gather(1, blocks).repeat_interleave(size, dim=1)
        self._row = torch.arange(len(blocks), device=blocks.device)[:, None]  # (B, 1)
        self.is_masked = self.pack(masked)
        self.scored = places_of(self.is_masked, total)
        self.places = self.scored[0], self.columns[self.scored]

    def pack(self, tensor: Tensor) -> Tensor:
        """(B, L', ...) -> (B, A * S, ...)."""
        return tensor[self._row, self.columns]  # `gather` would keep the whole tensor for the backward pass

    def unpack(self, packed: Tensor, known: Tensor) -> Tensor:
        """(B, A * S, ...) -> (B, L', ...): what is packed, and in blocks that are not what is `known`."""
        is_active = self.is_active.view(*self.is_active.shape, *[1] * (packed.ndim - 2))
        values = torch.where(is_active, packed.to(known.dtype), self.pack(known))
        return known.index_put((self._row, self.columns), values)


class BlockDenoiser:
    """Block diffusion: one clean pass, then noisy passes over the active blocks, packed side by side in each row.

    Every step is one pass, even if no block is active, so that processes which train together stay in step.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        config: RelayConfig,
        rows: RolloutRows,
        clean_block_starts: bool = False,
        z_loss: float = 0.0,
    ) -> None:
        self.model = model
        self.config = config
        self.clean_block_starts = clean_block_starts
        self.z_loss = z_loss
        self.size: int = config.block_size
        # FlexAttention computes whole tiles, and is compiled for each shape: widths of whole tiles keep shapes few.
        attention = config.text_config._attn_implementation
        self.unit = math.lcm(self.size, FLEX_TILE) if attention == "flex_attention" else self.size
        self.length = rows.clean_ids.shape[1]
        self.clean_ids = self._pad(rows.clean_ids)  # (B, L') with L' a multiple of the unit
        self.positions = torch.arange(self.clean_ids.shape[1], device=self.clean_ids.device)[None]
        # Rows are filled up to whole blocks, so that text never sees padding, unless the model's positions end before.
        is_cut = config.positions is not None and config.positions < self.clean_ids.shape[1]
        self.is_text = self._pad(rows.attention_mask) if is_cut else None  # (B, L')
        self.has_pattern = attention == BLOCK_ATTENTION and self.is_text is None
        # The first window fills the clean pass; every window sets what its steps see of it.
        self.clean_pass: CleanText | None = None
        self.clean_losses: Tensor | None = None
        self.stand_in: CleanText | None = None
        self.clean: CleanText | None = None
        self.clean_hidden: Tensor | None = None
        self.edge: Tensor | None = None

    def _run_clean_pass(self) -> tuple[CleanText, Tensor]:
        """Runs the clean text, and looks up the embeddings of the whole rollout.

        Returns:
            What the pass leaves, and the (0,) losses of no position, which are part of its graph.
        """
        clean = CleanText(self.config.mask_token_id)
        output = self.model(
            input_ids=self.clean_ids,
            attention_mask=self._pattern(self.positions, 0) if self.has_pattern else self.is_text,
            position_ids=self._existing(self.positions),
            cache=clean,
            logits_to_keep=self.clean_ids.new_empty(0),
            targets=self.clean_ids,
            output_relay_state=False,
        )
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
        hidden = self.clean.hidden
        self.clean_hidden = align_to_positions(hidden, self.positions) if self.config.token_shift else hidden

    def step(self, rows: RolloutRows, state: Tensor | None, leaves_state: bool) -> StepResult:
        blocks = self._packed(rows)
        scoring = {"targets": blocks.pack(self.clean_ids), "z_loss": self.z_loss, "leaves_state": leaves_state}
        receives = None
        if state is not None:
            state = blocks.pack(self._pad(state))
            receives = blocks.pack(self._pad(receives_state(self.config, rows)))
        output = self._forward(blocks, state, blocks.scored, receives=receives, **scoring)
        state = output.relay_state[:, : self.length] if leaves_state else None
        losses, confidence = (spread(n, blocks.places, rows.masked) for n in (output.token_losses, output.confidence))
        return StepResult(losses + self.edge, confidence, state)

    def predicted_state(self, rows: RolloutRows) -> Tensor:
        blocks = self._packed(rows)
        return self._forward(blocks, None, None).relay_state[:, : self.length]

    def _packed(self, rows: RolloutRows) -> PackedBlocks:
        mask_token_id = self.config.mask_token_id
        shown = self._pad(rows.noisy_ids(mask_token_id)) == mask_token_id
        return PackedBlocks(self._pad(rows.masked), shown, self.size, self.unit)

    def _forward(
        self, blocks: PackedBlocks, state: Tensor | None, scored: Places | None, **scoring: Any
    ) -> RelayOutput:
        """Runs packed blocks behind the clean text before each; arguments of `denoise`, packed."""
        before = blocks.pack(self.clean_hidden) if self.config.token_shift else None
        whole_rows = partial(self._whole_rows, blocks)
        takes_before = self._takes_before(blocks.columns)
        prefix = CleanPrefix(self.clean, blocks.seen, before, takes_before, blocks.masks, whole_rows)
        attention = self._pattern(blocks.columns, blocks.seen) if self.has_pattern else self._mask(blocks, prefix)
        return denoise(
            self.model,
            blocks.pack(self.clean_ids).masked_fill(blocks.is_masked, self.config.mask_token_id),
            prefix,
            state,
            scored,
            attention_mask=attention,
            position_ids=self._existing(blocks.columns),
            inputs_embeds=torch.where(
                blocks.is_masked[..., None], self.clean.mask_embeds, blocks.pack(self.clean.embeds)
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
        clean = self.clean.read_out
        read_out = blocks.unpack(raw, clean)
        if self.config.token_shift:
            before = align_to_positions(clean, self.positions) if self.clean_block_starts else None
            read_out = align_to_positions(read_out, self.positions, before, self._takes_before(self.positions))
        nothing = torch.zeros_like(self.clean_ids, dtype=torch.bool)
        return read_out, blocks.unpack(head_inputs, self.clean_hidden), blocks.unpack(is_masked, nothing)

    def _takes_before(self, positions: Tensor) -> Tensor | None:
        """(B, L) bool, block starts that read the clean text before the block; None unless `clean_block_starts`."""
        return positions % self.size == 0 if self.clean_block_starts else None

    def _pattern(self, columns: Tensor, seen: int) -> Tensor:
        """Blocks whose (B or 1, A * S) columns are given see themselves, and the text before them: for "relay_blocks".

        Args:
            columns: where the positions of the pass come from.
            seen: columns of clean text before those of the pass.
        """
        pattern, length = packed_pattern(columns[:, :: self.size], self.size), columns.shape[1]
        # Only a CPU reads the pattern without a wait; other devices should use FlexAttention.
        return pattern if columns.device.type == "cpu" else dense_mask(pattern, length, seen + length)

    def _mask(self, blocks: PackedBlocks, prefix: CleanPrefix) -> Any:
        """The same for other attention functions."""
        length = prefix.get_seq_length()
        block = blocks.columns // self.size  # (B, A*S)
        clean_block = self.positions[:, :length].expand(len(block), -1) // self.size
        key_block = torch.cat([clean_block, block], dim=1)
        is_noisy = torch.arange(key_block.shape[1], device=block.device) >= length

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            here = block[row, query - length]
            return torch.where(is_noisy[key], key_block[row, key] == here, key_block[row, key] < here)

        is_text = self.is_text
        return create_bidirectional_mask(
            self.config.text_config,
            # Stands for the embeddings, of which only shape and device matter here.
            torch.empty(*block.shape, 0, device=block.device),
            None if is_text is None else torch.cat([is_text[:, :length], blocks.pack(is_text)], dim=1),
            **as_cache_argument(prefix),
            and_mask_function=sees,
        )

    def _existing(self, positions: Tensor) -> Tensor:
        """No text looks at what fills up the blocks, so it takes no position that a table may not have."""
        return positions if self.is_text is None else positions.clamp(max=self.config.positions - 1)

    def _pad(self, tensor: Tensor) -> Tensor:
        """Pads the positions, the second axis, to whole units."""
        return fit_positions(tensor, rounded_up(self.length, self.unit))
