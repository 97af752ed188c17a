"""A plain decoder to judge `generate` by: one row, no cache, a full forward for every step."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from relay_hf import RelayForMaskedDiffusion, RelayGenerateOutput
from relay_hf.modeling import make_policy
from relay_hf.modeling.unmasking_relay import Progress

from ..conftest import MASK

# Random prompts of less than a block, exactly one, one and a bit, several, and exactly two, for blocks of eight.
LENGTHS = (3, 8, 13, 27, 16)
PAD = 0
# Values of `relay_start` by channel.
STARTS = {
    "layer_norm": ("self",),
    "residual_context": ("self", "reference"),
    "soft_mask": ("self", "reference"),
}


@dataclass
class Alone:
    """One decoded row: its new tokens, and forwards by kind in the order (denoise, commit, prefill).

    `references` counts forwards of a reference model. Of each new token also the denoise forward that revealed it, 0 if
    none did, and its probability then.
    """

    tokens: list[int]
    forwards: tuple[int, int, int]
    references: int = 0
    revealed_at: list[int] = field(default_factory=list, compare=False)
    confidence: list[float] = field(default_factory=list, compare=False)


def prompts_of(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, MASK, (length,), generator=generator) for length in lengths]


def prompt_of(length: int) -> Tensor:
    """A batch of one."""
    return prompts_of((length,))[0][None]


def padded(prompts: list[Tensor], side: str) -> dict[str, Tensor]:
    """One batch; `mixed` puts the padding of row r left, right or on both sides in turn."""
    width = max(map(len, prompts)) + (2 if side == "mixed" else 0)
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        spare = width - len(prompt)
        begin = {"left": spare, "right": 0, "mixed": (spare, 0, spare // 2)[row % 3]}[side]
        ids[row, begin : begin + len(prompt)], mask[row, begin : begin + len(prompt)] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def run(model: RelayForMaskedDiffusion, inputs: dict[str, Tensor] | Tensor, **options: Any) -> RelayGenerateOutput:
    """`generate` without stop tokens, at a threshold that the tiny models are above about half the time."""
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    options = {"unmasking_threshold": 0.3, "eos_token_id": None, "pad_token_id": PAD, **options}
    return model.generate(**inputs, return_dict_in_generate=True, **options)


class StaleStates(DynamicCache):
    """Lets a full forward see keys and values of an earlier one, at the positions that it is not to compute anew."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[int, tuple[Tensor, Tensor]] = {}
        self.fresh = torch.empty(0, dtype=torch.long)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if layer in self.states:
            old_keys, old_values = self.states[layer]
            old_keys[:, :, self.fresh], old_values[:, :, self.fresh] = keys[:, :, self.fresh], values[:, :, self.fresh]
            keys, values = old_keys, old_values
        self.states[layer] = (keys.clone(), values.clone())
        return keys, values


def decode_alone(
    model: RelayForMaskedDiffusion,
    prompt: Tensor,
    new_tokens: int,
    *,
    threshold: float,
    sub_block_size: int | None = None,
    use_relay: bool = True,
    eos_token_id: int | None = None,
    policy: str = "confidence_threshold",
    denoising_steps: int | None = None,
    unmasking_order: str = "confidence",
    use_sub_block_cache: bool | str = False,
    fuse_commits: bool = False,
    relay_start: str | None = None,
    reference_model: RelayForMaskedDiffusion | None = None,
) -> Alone:
    """Follows DESIGN.md section 5 in the slowest way."""
    config, length = model.config, len(prompt)
    size, end = config.block_size, length + new_tokens
    begin = length // size * size
    tokens, denoise, commit, references = prompt.clone(), 0, 0, 0
    revealed_at, confidence = torch.zeros(2, end + size)
    while True:
        masks = torch.full((begin + size - len(tokens),), MASK)
        tokens = torch.cat([tokens, masks])
        first_is_due = config.token_shift and tokens[begin] == MASK
        if first_is_due and not (fuse_commits and commit):
            # The position before has scored it already, and blocks never change what is before them.
            confidence[begin], tokens[begin] = best_of(forward(model, tokens, None, begin).logits[0, begin])
            first_is_due = False
        state = model.initial_relay_state(1, len(tokens)) if use_relay else None
        stale, refreshed, is_started = StaleStates(), None, relay_start is None
        steps_of: dict[int, int] = {}
        while True:
            stops = [i for i in range(max(begin, length), len(tokens)) if tokens[i] == eos_token_id]
            stop = min([*stops, end])
            masked = [i for i in range(begin, begin + size) if tokens[i] == MASK]
            if not masked or masked[0] >= stop:
                break
            part = torch.tensor([(i - begin) // (sub_block_size or size) for i in range(len(tokens))])
            is_recomputed = part >= part[masked[0]] if use_sub_block_cache == "prefix" else part == part[masked[0]]
            here = (is_recomputed & (torch.arange(len(tokens)) >= begin)).nonzero()[:, 0]
            active = (tokens == MASK) & (part == part[masked[0]])
            cache = None
            if not is_started:
                state, is_started = start_of(relay_start, model, tokens, begin, reference_model), True
                denoise, references = denoise + (relay_start == "self"), references + (relay_start == "reference")
            if use_sub_block_cache:
                cache = stale
                if refreshed != part[masked[0]] or (config.token_shift and masked[0] == here[0]):
                    here, refreshed = torch.arange(begin, len(tokens)), part[masked[0]]
                stale.fresh = here
            output = forward(model, tokens, state, begin, cache)
            denoise += 1
            if not use_relay or state is None or cache is None or len(here) == size:
                state = output.relay_state if use_relay else None
            elif output.relay_state is not None:
                carried = here[1:] if config.token_shift else here
                state = state.index_copy(1, carried, output.relay_state[:, carried])
            if first_is_due:
                confidence[begin], tokens[begin] = best_of(output.logits[0, begin])
                revealed_at[begin], active[begin], first_is_due = denoise, False, False
            step = steps_of.setdefault(number := int(part[masked[0]]), 0)
            steps_of[number] += 1
            rule = make_policy(policy, threshold, denoising_steps, unmasking_order)
            progress = Progress(torch.tensor([step]), torch.tensor([sub_block_size or size]))
            chosen, probability = reveal(tokens, output.logits[0], active, rule, progress)
            where = chosen.nonzero()[:, 0]
            revealed_at[where], confidence[where] = float(denoise), probability[where]
        if stop < begin + size or end <= begin + size:
            new = slice(length, min(stop + 1, end))
            forwards = (denoise, 0 if fuse_commits else commit, int(length >= size))
            history = revealed_at[new].tolist(), confidence[new].tolist()
            return Alone(tokens[new].tolist(), forwards, references, *history)
        begin, commit = begin + size, commit + 1


def forward(
    model: RelayForMaskedDiffusion, tokens: Tensor, state: Tensor | None, begin: int, cache: StaleStates | None = None
) -> Any:
    """Full forward; a state enters the block from `begin` on only, and of that what the scope says."""
    receives = model.receives_state(tokens[None]) & (torch.arange(len(tokens)) >= begin)
    with torch.no_grad():
        return model(tokens[None], relay_state=state, relay_mask=receives, cache=cache)


def start_of(
    name: str | None,
    model: RelayForMaskedDiffusion,
    tokens: Tensor,
    begin: int,
    reference: RelayForMaskedDiffusion | None,
) -> Tensor:
    """The state that `relay_start` asks for, made one position after the other."""
    if name == "self":
        return forward(model, tokens, None, begin).relay_state
    state = torch.zeros(1, len(tokens), model.config.relay_state_width)
    embeddings = model.get_input_embeddings().weight.detach()
    logits = forward(reference, tokens, None, begin).logits[0]
    for place in range(begin, len(tokens)):
        if tokens[place] == MASK:
            mean, number = model.relay.summarise(logits[place][None].float(), embeddings)
            state[0, place] = torch.cat([mean[0], number])
    return state


def best_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(V,) -> probability and id of the best token that is not [MASK]."""
    token = logits.index_fill(0, torch.tensor(MASK), -1e9).argmax()
    return logits.softmax(-1)[token], token


def reveal(tokens: Tensor, logits: Tensor, active: Tensor, policy: Any, progress: Progress) -> tuple[Tensor, Tensor]:
    """Writes the tokens of one step into `tokens`; returns which they are and how probable every position's best is."""
    probabilities = logits.float().softmax(-1)
    entropy = -torch.xlogy(probabilities, probabilities).sum(-1)
    confidence, best = probabilities.index_fill(1, torch.tensor([MASK]), -1.0).max(-1)
    margin = confidence - probabilities.scatter(1, best[:, None], 0.0).amax(-1)
    measure = {"entropy": entropy, "margin": margin, "confidence": confidence.clamp(min=0.0)}[policy.reads]
    chosen = policy(measure[None], active[None], progress)[0]
    tokens[chosen] = best[chosen]
    return chosen, confidence


def new_tokens_of(output: RelayGenerateOutput, prompt_columns: int, pad: int, eos: int | None) -> list[Alone]:
    """The rows of a batch in the form of `decode_alone`; checks that nothing but padding follows a stop token."""
    rows = []
    counts = zip(output.denoise_forwards, output.commit_forwards, output.prefill_forwards, strict=True)
    references = output.reference_forwards
    references = [0] * len(output.sequences) if references is None else references.tolist()
    new_tokens = output.sequences[:, prompt_columns:].tolist()
    for row, forwards, asked in zip(new_tokens, counts, references, strict=True):
        end = row.index(eos) + 1 if eos in row else len(row)
        assert row[end:] == [pad] * (len(row) - end)
        rows.append(Alone(row[:end], tuple(int(count) for count in forwards), asked))
    return rows
