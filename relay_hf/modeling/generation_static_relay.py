"""Static steps: a block decoder whose steps have fixed shapes, in one function that waits for nothing.

So `torch.compile` can compile the whole step, and a graph of its kernels can be replayed. On a GPU, a step of few rows
takes as long as its thousand launches of kernels take, not as long as what they compute.

Legend: B rows in work, S positions of a block, s of a sub-block, N = B * s positions that a step scores, K columns of
the memory that it sees, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    LinearTemperatureScheduleLogitsProcessor,
    StaticCache,
    generation,
)

from .attention_blocks_relay import BLOCK_ATTENTION
from .cache_static_relay import COLUMNS_AT_LEAST, Room, StaticBlock, StaticPrefix, coarse
from .generation_blocks_relay import BlockDecoder
from .generation_candidates_relay import Candidates, find_candidates, progress_before
from .generation_options_relay import DecodingOptions
from .generation_tokens_relay import Choice, TokenChooser, uniform_numbers
from .prefix_relay import denoise
from .unmasking_relay import Progress, UnmaskingPolicy
from .versions_relay import CACHE_ARGUMENT

# Of one function; they differ in rows, columns, and options such as the threshold. Beyond, steps run uncompiled.
GRAPHS_AT_MOST = 64
# Columns of a canvas are rounded up to few widths.
CANVAS_AT_LEAST = 32
# Options that change the shape of steps.
NOT_STATIC = ("use_sub_block_cache", "fuse_commits", "relay_start")
# Processors that read nothing but scores, and wait for nothing.
STATIC_PROCESSORS = (
    generation.EpsilonLogitsWarper, generation.InfNanRemoveLogitsProcessor, generation.LogitNormalization,
    generation.MinPLogitsWarper, generation.SequenceBiasLogitsProcessor, generation.SuppressTokensLogitsProcessor,
    generation.TemperatureLogitsWarper, generation.TopKLogitsWarper, generation.TopPLogitsWarper,
    generation.TypicalLogitsWarper, LinearTemperatureScheduleLogitsProcessor,
)  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """What stays the same in all steps of a `generate`.

    Args:
        policy: chooses the positions to reveal.
        chooser: chooses the token of each scored position.
        stops: (n,) tokens that end a row, or None.
        size: s.
        is_canvas: the whole sequence is one block.
        has_state: a relay state is carried from step to step.
    """

    policy: UnmaskingPolicy
    chooser: TokenChooser
    stops: Tensor | None
    size: int
    is_canvas: bool
    has_state: bool


def denoise_step(
    model: Any, block: StaticBlock, memory: list[tuple[Tensor, Tensor]], sees: Tensor, rules: Rules
) -> Tensor:
    """One denoise step of all rows: embeds, injects the state, runs the network, scores, reveals.

    Args:
        model: the `RelayForMaskedDiffusion`.
        block: the block in work, changed in place.
        memory: keys and values of each layer, (B, heads, >= K, width) each, changed in place.
        sees: (B, K) bool, columns of the memory that each row sees.
        rules: options of the `generate`.

    Returns:
        (1 + B,) long: the number of rows that need another step, and the column behind the last token of each row.
    """
    texts, mask_token_id = block.texts, model.config.mask_token_id
    now = find_candidates(texts, rules.stops, rules.size, mask_token_id)
    places = now.begins[:, None] + torch.arange(rules.size, device=now.begins.device)  # (B, s)
    # Where the block cuts a sub-block off, its first or last position comes several times.
    places = places.clamp(0, texts.tokens.shape[1] - 1)
    rows = torch.arange(len(places), device=places.device)[:, None].expand_as(places)
    output = denoise(
        model,
        texts.tokens,
        StaticPrefix(memory, sees.shape[1], block),
        block.state if rules.has_state else None,
        (rows.flatten(), places.flatten()),
        receives=model.receives_state(texts.tokens) & block.has_state,
        leaves_state=rules.has_state,
        attention_mask=sees,
        position_ids=block.positions,
    )
    if rules.has_state:
        # A row that waits for others loses its own, which no later step asks for.
        block.state.copy_(output.relay_state)
        block.has_state.fill_(True)
    block.forwards += now.active
    choice = _choose(model, block, now, rules, output.head_inputs, (rows, places))
    _reveal(block, now, rules, choice, places)
    after = find_candidates(texts, rules.stops, rules.size, mask_token_id)
    return torch.cat([after.active.sum()[None], after.end])


def commit_step(
    model: Any, block: StaticBlock, memory: list[tuple[Tensor, Tensor]], sees: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the keys and values of the complete block, without any relay state; arguments of `denoise_step`.

    Returns:
        (B, 1, D) raw input of the head at the last position, and what the channel reads there.
    """
    prefix: Any = StaticPrefix(memory, sees.shape[1], block)
    model(
        block.tokens,
        attention_mask=sees,
        position_ids=block.positions,
        cache=prefix,
        logits_to_keep=block.columns[:0],
        output_relay_state=False,
    )
    return prefix.hidden[:, -1:], prefix.read_out[:, -1:]


def _choose(
    model: Any, block: StaticBlock, now: Candidates, rules: Rules, head_inputs: Tensor, where: tuple[Tensor, Tensor]
) -> Choice:
    """A token for each of the N positions, whose rows and columns are given as (B, s)."""
    if not rules.chooser.needs_logits:
        return rules.chooser.best(model, head_inputs)
    rows, places = where[0].flatten(), where[1]
    numbers = uniform_numbers(block.seeds[:, None], block.forwards[:, None], block.positions.gather(1, places))
    share_left = now.masked.sum(-1) / block.masks_at_begin
    logits = model.deciding_logits(head_inputs)
    return rules.chooser(logits, block.tokens[rows], share_left[rows][:, None], numbers.flatten())


def _reveal(block: StaticBlock, now: Candidates, rules: Rules, choice: Choice, places: Tensor) -> None:
    """Writes the tokens that the policy reveals, of a choice for the (B, s) places."""
    before = progress_before(Progress(block.step, block.total), block.sub_block, now, rules.size, rules.is_canvas)
    confidence, measure = (
        torch.zeros_like(block.confidence).scatter(1, places, numbers.view_as(places))
        for numbers in (choice.confidence, choice.measure)
    )
    revealed = rules.policy(measure, now.candidates, before)
    tokens = block.tokens.scatter(1, places, choice.tokens.view_as(places))
    for memory, new in (
        (block.tokens, tokens),
        (block.confidence, confidence),
        (block.revealed_at, block.forwards[:, None]),
    ):
        memory.copy_(torch.where(revealed, new, memory))
    block.sub_block.copy_(now.sub_block.where(now.active, block.sub_block))
    block.step.copy_(before.step + now.active)
    block.total.copy_(before.positions)


@dataclass
class StaticDecoder(BlockDecoder):
    """Decodes one batch by static steps.

    Rows that have ended stay in the batch, and take part in nothing, until half of the rows are enough. Rows of other
    decoders cannot join.

    Args:
        compile_config: how to compile the steps; None = run them as they are.

    Raises:
        ValueError: static steps cannot honour an option, a logits processor, or the model's attention.
    """

    compile_config: CompileConfig | None = None
    takes_rows = False  # static memory cannot grow

    def __post_init__(self) -> None:
        super().__post_init__()
        check_static(self.model, self.options, self.chooser)
        model, limit = self.model, self.model.learned_positions
        self.is_canvas = model.config.block_size is None
        self.width: int = self.grid.width  # S
        if self.is_canvas:
            self.width = coarse(self.width, CANVAS_AT_LEAST)
            self.width = self.width if limit is None else min(self.width, limit)
        self.rules = Rules(
            policy=self.options.policy,
            chooser=self.chooser,
            stops=self.stops,
            size=self.options.sub_block_size or self.width,
            is_canvas=self.is_canvas,
            has_state=self.options.use_relay and model.config.relay_state_width > 0,
        )
        steps: list[Callable[..., Any]] = [denoise_step, commit_step]
        if self.compile_config is not None:
            # Calls with equal settings share their graphs, which dynamo keeps with the function.
            how: dict[str, Any] = {"recompile_limit": GRAPHS_AT_MOST, **self.compile_config.to_dict()}
            steps = [torch.compile(step, **how) for step in steps]
        self.denoise_step, self.commit_step = steps
        for processor in self.chooser.processors:
            if isinstance(processor, generation.SequenceBiasLogitsProcessor):
                # The first call moves its numbers to the device, which a step must not do.
                processor(
                    self.grid.tokens[:1], torch.zeros(1, model.config.text_config.vocab_size, device=model.device)
                )
        self.room: Room | None = None
        self.block: Any = None
        self.sees: Any = None
        self.memory: list[tuple[Tensor, Tensor]] = []

    def _denoise(self, columns: slice) -> None:
        grid, begin = self.grid, columns.start
        if self.room is None:
            self.room = self._take_room()
        self._enter(columns)
        firsts = zip(self.planner.first_masks(begin, is_committed=True), grid.ends, strict=True)
        needed = self.is_canvas or any(begin + first < min(end, columns.stop) for first, end in firsts)
        while needed:
            found = self.denoise_step(self.model, self.block, self.memory, self.sees, self.rules)
            needed, *ends = found.tolist()  # the one wait
            if not needed:
                grid.move_ends(found[1:] + begin, [begin + end for end in ends])
            if self.shows_drafts:
                grid.tokens[:, columns] = self.block.tokens[:, : grid.width]
                self._stream_drafts(columns)
        grid.tokens[:, columns] = self.block.tokens[:, : grid.width]
        grid.denoise_forwards = self.block.forwards.clone()
        (batch,) = grid.batches
        if batch.recorder is not None:
            notes = (self.block.revealed_at, self.block.confidence)
            batch.recorder.record_block(batch.rows, columns, *(each[:, : grid.width] for each in notes))

    def _take_room(self) -> Room:
        grid, cache = self.grid, self.cache
        if cache.get_seq_length() == 0:
            # Only a forward knows the shapes of keys and values. It commits nothing.
            self.model(grid.tokens[:, : grid.width], cache=cache.prefix(), logits_to_keep=grid.seeds[:0])
        return self.model.static_rooms.take(self.model, cache, len(grid.ends), self.width, grid.tokens.shape[1])

    def _enter(self, columns: slice) -> None:
        """Writes a block of the grid to static memory."""
        room: Any = self.room
        grid, cache, width, texts = self.grid, self.cache, self.grid.width, self.grid.texts(columns)
        if self.block is None or len(self.block.tokens) != len(grid.ends):
            self.block, self.memory = room.of_rows(len(grid.ends))
        block = self.block
        for memory in (block.visible, block.state, block.revealed_at):
            memory.zero_()
        block.tokens[:, :width], block.visible[:, :width] = texts.tokens, texts.visible
        positions = grid.positions(columns.start, columns.stop)
        block.positions[:, :width], block.positions[:, width:] = positions, positions[:, -1:]
        for memory, numbers in (
            (block.prompt_end, texts.prompt_end),
            (block.end, texts.end),
            (block.anchor, texts.anchor),
            (block.seeds, grid.seeds),
            (block.forwards, grid.denoise_forwards),
            (block.masks_at_begin, texts.masked(self.mask_token_id).sum(-1).clamp(min=1)),
            (block.before, cache.last_hidden),
            (block.read_out_before, cache.last_read_out),
        ):
            if numbers is not None:
                memory.copy_(numbers)
        block.sub_block.fill_(torch.iinfo(torch.long).min)
        block.has_state.fill_(self.model.initial_relay_state(0, 0) is not None)
        torch.add(torch.arange(self.width, device=block.columns.device), columns.start, out=block.columns)
        self.sees = block.sees(grid.visible[:, : columns.stop], coarse(columns.stop, COLUMNS_AT_LEAST))

    def _commit(self, begin: int, stop: int) -> None:
        if self.room is None:  # prefill
            return super()._commit(begin, stop)
        last = self.commit_step(self.model, self.block, self.memory, self.sees)
        self.cache.append(self.grid.tokens[:, begin:stop], *last)

    def _retire(self, stop: int) -> None:
        grid = self.grid
        # Rows that go on first, then ended ones that fill up a power of two.
        rows = sorted(range(len(grid.ends)), key=lambda row: grid.ends[row] <= stop)
        alive = sum(end > stop for end in grid.ends)
        rows = rows[: 1 << (alive - 1).bit_length() if alive else 0]
        if len(rows) < len(grid.ends):
            kept = torch.tensor(rows, dtype=torch.long, device=grid.tokens.device)
            grid.keep(kept, rows, stop)
            if rows:
                self.cache.batch_select_indices(kept)
                self._enter(slice(stop - grid.width, stop))  # for its commit

    def finish(self) -> None:
        room: Any = self.room
        if room is None:
            return super().finish()
        room.move_out(self.cache)
        super().finish()
        self.model.static_rooms.give_back(room)


def check_static(model: Any, options: DecodingOptions, chooser: TokenChooser) -> None:
    """Raise a ValueError if steps of fixed shapes cannot do what a `generate` asks for.

    Args:
        model: the `RelayForMaskedDiffusion`.
        options: options of the `generate`.
        chooser: its logits processors.
    """
    for name in NOT_STATIC:
        if value := getattr(options, name):
            raise ValueError(
                f"`{name}={value!r}` changes the shape of steps, which `cache_implementation='static'` fixes: leave "
                "out one of them."
            )
    for processor in chooser.processors:
        if not isinstance(processor, STATIC_PROCESSORS):
            raise ValueError(
                f"{type(processor).__name__} reads more than scores, or waits for the device, which a step of "
                "`cache_implementation='static'` must not: leave one of them out."
            )
    attention = model.model.config._attn_implementation
    if attention != BLOCK_ATTENTION:
        raise ValueError(
            f"`attn_implementation={attention!r}` prepares masks of many shapes, which `cache_implementation='static'` "
            f"does without: call `model.set_attn_implementation({BLOCK_ATTENTION!r})`, or leave the cache out."
        )


def step_compilation(model: Any, generation_config: GenerationConfig) -> CompileConfig | None:
    """How to compile the steps of a `generate`; None = not at all.

    transformers compiles on accelerators, by rules of its own about quantised and offloaded models, of which it warns.
    They are private, but the only ones that stay the same as those of all other models. They ask for a static cache.
    """
    cache: Any = StaticCache(config=model.config.text_config, max_cache_len=1)
    if not model._valid_auto_compile_criteria({CACHE_ARGUMENT: cache}, generation_config):
        return None
    return generation_config.compile_config or CompileConfig()
