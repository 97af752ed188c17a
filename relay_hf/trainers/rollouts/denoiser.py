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
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ...modeling import RelayConfig
from ...modeling.attention_relay import align_to_positions
from ...modeling.channel_relay import in_scope
from ...modeling.outputs_relay import RelayOutput
from ...modeling.prefix_relay import Prefix, denoise
from .active_blocks import PackedBlocks, Places, places_of, rounded_up, spread
from .clean_text import CleanPrefix, CleanText
from .packing import Layout
from .patterns import BlockPatterns, pattern_of_texts
from .rows import RolloutRows, fit_positions

FLEX_TILE = 128  # positions of a tile of FlexAttention, whatever the kernel's own tiles are


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
    layout: Layout | None = None,
) -> Denoiser:
    """The denoiser for a model and the text of some rows.

    Args:
        model: a `RelayForMaskedDiffusion`, possibly wrapped by PEFT or DDP.
        config: its configuration.
        rows: whose text is denoised.
        clean_block_starts: with token shift, position 0 of a block is scored by the position before it. That is clean
            text in decoding, but the noisy block before in the published training; True trains what decoding does.
        z_loss: how much of log(sum(exp(logits)))^2 each loss includes.
        layout: puts the texts side by side for the model; None = each has a row of its own.
    """
    joined = rows if layout is None else layout.join_rows(rows)
    denoiser: Denoiser
    if config.block_size is None:
        denoiser = SequenceDenoiser(model, config, z_loss, layout)
    else:
        denoiser = BlockDenoiser(model, config, joined, clean_block_starts, z_loss, layout)
    return denoiser if layout is None else SideBySide(denoiser, joined, layout)


def receives_state(config: RelayConfig, rows: RolloutRows) -> Tensor:
    """(B, L) bool, positions that the state enters; a row that starts from "none" gets it from its second step on.

    [MASK]s that only fill up the last block are among them, as in decoding.
    """
    receives = in_scope(config, rows.noisy_ids(config.mask_token_id) == config.mask_token_id)
    has_state = rows.has_state.view(len(rows), -1)  # (B, 1), or (B, L) where rows hold several texts
    return receives & has_state if config.relay_initial_state == "none" else receives


class SideBySide:
    """Denoises texts that share rows: what is outside sees each text in a row of its own.

    Args:
        denoiser: of the rows that hold several texts.
        joined: those rows.
        layout: where each text is.
    """

    def __init__(self, denoiser: Denoiser, joined: RolloutRows, layout: Layout) -> None:
        self.denoiser = denoiser
        self.config = denoiser.config
        self.joined = joined
        self.layout = layout

    def begin_window(self, is_last: bool) -> None:
        self.denoiser.begin_window(is_last)

    def step(self, rows: RolloutRows, state: Tensor | None, leaves_state: bool) -> StepResult:
        state = None if state is None else self.layout.join(state)
        result = self.denoiser.step(self._join(rows), state, leaves_state)
        return StepResult(*(None if tensor is None else self.layout.split(tensor) for tensor in result))

    def predicted_state(self, rows: RolloutRows) -> Tensor:
        return self.layout.split(self.denoiser.predicted_state(self._join(rows)))

    def _join(self, rows: RolloutRows) -> RolloutRows:
        """Steps change nothing of the rows but these."""
        return replace(self.joined, masked=self.layout.join(rows.masked), has_state=self.layout.join(rows.has_state))


class SequenceDenoiser:
    """Whole-sequence models: every position of a text sees every other. A step waits for the device once.

    Args:
        model, config, z_loss: as in `make_denoiser`.
        layout: of texts that share rows.
    """

    def __init__(
        self, model: Callable[..., Any], config: RelayConfig, z_loss: float = 0.0, layout: Layout | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.z_loss = z_loss
        # What a pass is given where texts share rows; else it is a mask of the padding.
        self.shared: dict[str, Any] = {}
        if layout is not None:
            self.shared = {
                "attention_mask": pattern_of_texts(config, layout.starts),
                "position_ids": layout.positions,
            }

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
        inputs = self.shared or {"attention_mask": rows.attention_mask if sizes.is_padded else None}
        return denoise(
            self.model,
            rows.noisy_ids(self.config.mask_token_id),
            Prefix([], 0, is_one_block=True, is_aligned=True, masks=sizes.masks),
            state,
            scored,
            receives=receives_state(self.config, rows),
            **inputs,
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


class BlockDenoiser:
    """Block diffusion: one clean pass, then noisy passes over the active blocks, packed side by side in each row.

    Every step is one pass, even if no block is active, so that processes which train together stay in step.

    Args:
        model, config, clean_block_starts, z_loss: as in `make_denoiser`.
        rows: likewise, or rows that hold several texts.
        layout: of texts that share rows.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        config: RelayConfig,
        rows: RolloutRows,
        clean_block_starts: bool = False,
        z_loss: float = 0.0,
        layout: Layout | None = None,
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
        self.columns = torch.arange(self.clean_ids.shape[1], device=self.clean_ids.device)[None]
        # Rows are filled up to whole blocks, so that text never sees padding, unless the model's positions end before.
        longest = self.clean_ids.shape[1] if layout is None else layout.longest
        is_cut = config.positions is not None and config.positions < longest
        is_text = self._pad(rows.attention_mask) if is_cut else None  # (B, L')
        self.shares_rows = layout is not None
        # (B or 1, L'). No text looks at what fills up the blocks, so it takes no position that a table may not have.
        self.positions = self.columns.clamp(max=config.positions - 1) if is_cut else self.columns
        starts = None
        if layout is not None:
            starts, self.positions = self._pad(layout.starts), self._pad(layout.positions)
        self.patterns = BlockPatterns(config, self.columns, starts, is_text)
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
            attention_mask=self.patterns.of_clean_text(),
            position_ids=self.positions,
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
        is_plain = self.positions is self.columns
        return denoise(
            self.model,
            blocks.pack(self.clean_ids).masked_fill(blocks.is_masked, self.config.mask_token_id),
            prefix,
            state,
            scored,
            attention_mask=self.patterns.of_blocks(blocks, prefix),
            position_ids=blocks.columns if is_plain else blocks.pack(self.positions.expand_as(self.clean_ids)),
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
            read_out = align_to_positions(read_out, self.positions, before, self._takes_before(self.columns))
        nothing = torch.zeros_like(self.clean_ids, dtype=torch.bool)
        return read_out, blocks.unpack(head_inputs, self.clean_hidden), blocks.unpack(is_masked, nothing)

    def _takes_before(self, columns: Tensor) -> Tensor | None:
        """(B or 1, L) bool, block starts that read the clean text before the block; None = those that positions show.

        With `clean_block_starts` all do. Where texts share rows, a block may lie beside one of another text whose last
        position is by chance the one before its first.
        """
        is_start = columns % self.size == 0
        if self.clean_block_starts:
            return is_start
        if not self.shares_rows:
            return None
        return is_start & F.pad(columns[:, 1:] != columns[:, :-1] + 1, (1, 0), value=True)

    def _pad(self, tensor: Tensor) -> Tensor:
        """Pads the positions, the second axis, to whole units."""
        return fit_positions(tensor, rounded_up(self.length, self.unit))
