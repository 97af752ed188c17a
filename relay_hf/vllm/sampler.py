"""The sampler: reveals tokens of all requests at once, moves blocks on, and says what vLLM may give out.

What is revealed is decided by the library: `TokenChooser` chooses tokens, an `UnmaskingPolicy` positions, `Channel`
makes the state. Nothing here waits for the device; a loop is over different options, not over requests.

Legend: n requests of the step, d of them with a block, S positions of a block, N positions that the step scores, D
hidden size, V vocabulary.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..modeling.attention_relay import align_to_positions
from ..modeling.generation_candidates_relay import find_candidates, progress_before
from ..modeling.generation_tokens_relay import Choice, uniform_numbers
from ..modeling.head_relay import best_token
from ..modeling.outputs_relay import Readings
from ..modeling.unmasking_relay import Progress
from .internals import SamplerOutput
from .plan import Scored, StepPlan, texts_of
from .rows import NO_TOKEN, NOWHERE, Moving, Rows

# On an accelerator 256 MiB of fp32, and as much again while they are read.
LOGITS_AT_ONCE = {"cpu": 2**22}
LOGITS_AT_ONCE_ELSEWHERE = 2**26


class Reveal(NamedTuple):
    """What a step reveals.

    Attributes:
        canvas: (d, S) long, the blocks with the tokens that the policies reveal.
        progress: of the d requests, this step included.
        first: (n,) long, the next block's first token; `NO_TOKEN` where the step has not scored it.
    """

    canvas: Tensor
    progress: Progress
    first: Tensor


class RelaySampler:
    """Stands in for vLLM's sampler.

    Args:
        model: the `RelayForVllm`.
        rows: what each request is at.
        req_states: vLLM's own state of requests: their tokens, and the tokens that the next forward reads.
    """

    # vLLM reads it; there are no penalties.
    penalties_state = SimpleNamespace(output_bin_counts=None)

    def __init__(self, model: Any, rows: Rows, req_states: Any) -> None:
        self.model, self.rows, self.req_states = model, rows, req_states
        self.config = model.config
        self.size: int = model.config.block_size
        self.place = torch.arange(self.size, device=rows.device)
        # Positions whose logits are alive together.
        numbers = LOGITS_AT_ONCE.get(rows.device.type, LOGITS_AT_ONCE_ELSEWHERE)
        self.at_once = max(numbers // model.config.text_config.vocab_size, 1)

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """The state of the model has read the request."""

    def apply_staged_writes(self) -> None:
        """The state of the model has written all rows."""

    def __call__(self, logits: Tensor, input_batch: Any, draft_logits: Any = None) -> SamplerOutput:
        """Takes a step further. Logits are (0, D) then: the model has kept the outputs that the step asked for."""
        plan = self.model.step
        if plan is None:
            return self._measure(logits, input_batch.num_reqs)
        hidden: Tensor = self.model.hidden
        self.model.step = self.model.hidden = None
        self._keep_hidden(plan, hidden)
        return self._move_on(plan, self._reveal(plan, hidden[: plan.scored]))

    def _measure(self, logits: Tensor, count: int) -> SamplerOutput:
        """Takes the memory that a step takes, and chooses nothing: vLLM measures what is left for keys and values."""
        best_token(logits[:1].expand(self.at_once, -1).clone(), self.config.mask_token_id)
        none = torch.zeros(count, dtype=torch.int32, device=logits.device)
        return _output(none[:, None], none, none)

    # -- what is revealed -------------------------------------------------------------------------------------------

    def _reveal(self, plan: StepPlan, head_inputs: Tensor) -> Reveal:
        """Chooses tokens for the (N, D) scored positions, and reveals those that the policies choose."""
        size, drafts, count = self.size, plan.batch.drafts, len(plan.batch.slots)
        tokens = torch.full((count, size + 2), NO_TOKEN, device=head_inputs.device)
        measure = torch.zeros(count, size + 2, device=head_inputs.device)
        moving, sizes = plan.moving, plan.fixed.size[:drafts]
        done = Progress(moving.step[:drafts], moving.positions[:drafts])
        progress = progress_before(done, moving.sub_block[:drafts], plan.now, sizes, is_canvas=False)
        revealed = torch.zeros_like(plan.now.candidates)
        parts = head_inputs.split([each.count for each in plan.scored_by])
        for scored, part in zip(plan.scored_by, parts, strict=True):
            options = self.rows.options[scored.number]
            choice = self._choose(plan, scored, part)
            where = (scored.rows, scored.places)
            tokens.index_put_(where, choice.tokens)
            measure.index_put_(where, choice.measure)
            candidates = plan.now.candidates & plan.denoises[:, None]
            if scored.members is not None:
                candidates = candidates & scored.members[:drafts, None]
            revealed |= options.decoding.policy(measure[:drafts, :size], candidates, progress)
        canvas = torch.where(revealed, tokens[:drafts, :size], plan.canvas)
        return Reveal(canvas, Progress(progress.step + plan.denoises, progress.positions), tokens[:, size])

    def _choose(self, plan: StepPlan, scored: Scored, head_inputs: Tensor) -> Choice:
        """Chooses tokens, given the (N, D) inputs of the head; a piece at a time, so that logits take little memory."""
        chooser, pieces = self.rows.options[scored.number].chooser, []
        for begin in range(0, scored.count, self.at_once):
            some = slice(begin, begin + self.at_once)
            logits, where = self.model.logits_of(head_inputs[some]), (scored.rows[some], scored.places[some])
            # What greedy decoding does not read is not computed.
            nothing = logits.new_zeros(len(logits), 0, dtype=torch.long)
            share_left = self._share_left(plan, *where)[:, None] if chooser.processors else nothing
            numbers = self._numbers(plan, *where) if chooser.do_sample else nothing
            pieces.append(chooser(logits, nothing, share_left, numbers))
        return Choice(*(torch.cat(each) for each in zip(*pieces, strict=True)))

    def _share_left(self, plan: StepPlan, rows: Tensor, places: Tensor) -> Tensor:
        """(N,) share of each position's block that is masked."""
        drafts = plan.batch.drafts
        share = plan.now.masked.sum(-1) / plan.moving.masks_at_begin[:drafts]
        share = F.pad(share, (0, len(plan.batch.slots) - drafts), value=1.0)
        return torch.where(places < self.size, share[rows], 1.0)

    def _numbers(self, plan: StepPlan, rows: Tensor, places: Tensor) -> Tensor:
        """(N,) numbers to draw with, those that `generate` has for the same seed, forward and position."""
        drafts, moving = plan.batch.drafts, plan.moving
        # The first position of a block is behind the one in work, or behind the whole blocks of a prompt.
        behind = torch.cat([moving.begin[:drafts] + self.size, plan.batch.prompts.border])
        position = torch.where(places < self.size, moving.begin[rows] + places, behind[rows])
        forwards = moving.forwards + F.pad(plan.denoises.long(), (0, len(plan.batch.slots) - drafts))
        return uniform_numbers(plan.fixed.seed[rows], forwards[rows], position)

    # -- what is carried --------------------------------------------------------------------------------------------

    def _keep_hidden(self, plan: StepPlan, hidden: Tensor) -> None:
        """Stores the state that the forward leaves, and what a token-shift model aligns the next block's with.

        Args:
            plan: the step.
            hidden: (n, D) raw outputs, at the N scored positions, then at all positions of blocks.
        """
        drafts, rows, slots = plan.batch.drafts, self.rows, plan.batch.slots
        if rows.state.shape[-1] and drafts:
            blocks = hidden[plan.scored :].view(drafts, self.size, -1)
            state = self._next_state(plan, blocks, slots[:drafts])
            rows.state.index_copy_(0, slots[:drafts], state.to(rows.state.dtype))
        if rows.has_hidden and plan.scored:
            # Positions of the next block are scored at the end of this one.
            asked = torch.cat([each.rows for each in plan.scored_by])
            is_end = torch.cat([each.places for each in plan.scored_by]) == self.size
            rows.last_hidden[torch.where(is_end, slots[asked], len(rows.last_hidden) - 1)] = hidden[: plan.scored]

    def _next_state(self, plan: StepPlan, raw: Tensor, slots: Tensor) -> Tensor:
        """(d, S, D) raw outputs of blocks -> (d, S, W) what the channel carries to their next forward."""
        aligned = raw
        if self.config.token_shift:
            positions = plan.moving.begin[: len(raw), None] + self.place
            before = self.rows.last_hidden[slots][:, None] if self.rows.has_hidden else None
            aligned = align_to_positions(raw, positions, before)
        is_masked = plan.canvas == self.config.mask_token_id
        # Channels that read distributions are refused, so that nobody calls the head.
        return self.model.relay.next_state(Readings(aligned, aligned, is_masked, self.model.logits_of, self.model))

    # -- what comes out ---------------------------------------------------------------------------------------------

    def _move_on(self, plan: StepPlan, reveal: Reveal) -> SamplerOutput:
        """Ends blocks and begins others; writes the rows, and the tokens that the next forward reads."""
        rows, size, drafts, fixed, moving = self.rows, self.size, plan.batch.drafts, plan.fixed, plan.moving
        slots, prompts = plan.batch.slots, plan.batch.prompts
        is_prompt = F.pad(torch.zeros_like(plan.denoises), (0, len(slots) - drafts), value=True)
        denoises = F.pad(plan.denoises, (0, len(slots) - drafts))
        commits = ~denoises & ~is_prompt
        # 1. The block of the next step: the same one, the next one, or the first one behind a prompt.
        behind = torch.cat([moving.begin[:drafts] + size, prompts.border])
        begin = torch.where(denoises, moving.begin, behind)
        next_block = self._fresh_blocks(plan, begin, reveal.first)
        canvas = torch.cat(
            [torch.where(plan.denoises[:, None], reveal.canvas, next_block[:drafts]), next_block[drafts:]]
        )
        # 2. Is it complete, and the last one?
        texts = texts_of(canvas, fixed, begin)
        after = find_candidates(texts, rows.stops[slots][:, None], fixed.size, self.config.mask_token_id)
        is_complete, is_last = ~after.active, after.end <= size
        ends = denoises & is_complete & is_last
        # 3. What vLLM gets: a block is given out when it is committed, or at once if nothing follows.
        known = (fixed.prompt_end - moving.begin).clamp(0, size)
        gives = (commits | ends)[:drafts]
        given = torch.where(plan.denoises[:, None], reveal.canvas, plan.canvas)
        sampled = given.gather(1, (self.place + known[:drafts, None]).clamp(max=size - 1))
        num_sampled = torch.where(gives, size - known[:drafts], 0)
        # What vLLM has to compute once more: a block until it is committed, and what follows a prompt's whole blocks.
        rejected = torch.cat(
            [torch.where(gives, 0, size), torch.where(prompts.is_last, prompts.total - prompts.border, 0)]
        )
        self._write(plan, reveal, begin, canvas, denoises, is_complete, texts.masked(self.config.mask_token_id))
        pad = len(slots) - drafts
        return _output(F.pad(sampled, (0, 0, 0, pad)), F.pad(num_sampled, (0, pad)), rejected)

    def _fresh_blocks(self, plan: StepPlan, begin: Tensor, first: Tensor) -> Tensor:
        """(n, S) blocks that begin at the positions (n,): the end of the prompt, then masks."""
        mask, drafts, prompts = self.config.mask_token_id, plan.batch.drafts, plan.batch.prompts
        blocks = torch.full((len(begin), self.size), mask, device=begin.device)
        if len(begin) > drafts:
            texts = self.req_states.all_token_ids.gpu
            position = begin[drafts:, None] + self.place
            known = texts[plan.batch.slots[drafts:, None], position.clamp(max=texts.shape[1] - 1)]
            blocks[drafts:] = torch.where(position < prompts.total[:, None], known.long(), mask)
        if self.config.token_shift:
            # A prompt of whole blocks ends with the chunk that scores what follows it.
            is_first_known = (blocks[:, 0] == mask) & (begin > 0) & (first != NO_TOKEN)
            blocks[:, 0] = torch.where(is_first_known, first, blocks[:, 0])
        return blocks

    def _write(
        self,
        plan: StepPlan,
        reveal: Reveal,
        begin: Tensor,
        canvas: Tensor,
        denoises: Tensor,
        is_complete: Tensor,
        masked: Tensor,
    ) -> None:
        """Writes the rows of the step's requests; arguments of all n requests, of the block of their next step."""
        rows, moving, fixed, slots = self.rows, plan.moving, plan.fixed, plan.batch.slots
        pad = (0, len(slots) - plan.batch.drafts)
        sub_block, step, positions = (F.pad(each, pad) for each in (plan.now.sub_block, *reveal.progress))
        new = Moving(
            begin=begin,
            forwards=moving.forwards + denoises,
            sub_block=sub_block.where(denoises, NOWHERE),
            step=step,
            positions=positions,
            masks_at_begin=moving.masks_at_begin.where(denoises, masked.sum(-1).clamp(min=1)),
            # A block that needs no forward at all, because its first token ends the text, is given out by a commit.
            commits=is_complete,
            has_state=denoises & (fixed.uses_relay > 0),
        )
        rows.write_moving(slots, new)
        rows.canvas.index_copy_(0, slots, canvas)
        known = (fixed.prompt_end - begin).clamp(0, self.size)
        next_tokens = canvas.gather(1, (self.place + known[:, None]).clamp(max=self.size - 1))
        self.req_states.draft_tokens[slots] = next_tokens.to(self.req_states.draft_tokens.dtype)


def _output(sampled: Tensor, num_sampled: Tensor, num_rejected: Tensor) -> SamplerOutput:
    """What vLLM reads.

    Args:
        sampled: (n, S) tokens.
        num_sampled: (n,) how many of them are given out.
        num_rejected: (n,) positions of the step that are computed once more.
    """
    return SamplerOutput(
        sampled_token_ids=sampled.int(),
        logprobs_tensors=None,
        num_nans=None,
        num_sampled=num_sampled.int(),
        num_rejected=num_rejected.int(),
    )
