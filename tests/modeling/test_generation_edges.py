"""`generate` where options, canvases and failures meet: what must not hang, depend on neighbours or spoil a cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from relay_hf import RelayCache, RelayForMaskedDiffusion
from relay_hf.modeling.generation_stopping_relay import padding_token

from ..conftest import MASK, VOCAB_SIZE
from .decoding import PAD, padded, prompt_of, prompts_of, run


@pytest.fixture
def model(make_model: Callable) -> RelayForMaskedDiffusion:
    return make_model(open_channel=True, token_shift=True)


class HangError(Exception):
    """More forwards than there are positions."""


def fail_beyond(model: RelayForMaskedDiffusion, limit: int) -> None:
    left = [limit]

    def count(module: Any, arguments: tuple) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise HangError

    model.model.register_forward_pre_hook(count)


def blanked(length: int, *blanks: int) -> Tensor:
    return torch.arange(1, length + 1).index_fill(0, torch.tensor(blanks), MASK)


# -- repetition penalty ----------------------------------------------------------------------------------------------


def test_repetition_penalty_with_attention_mask_same_as_without(model: RelayForMaskedDiffusion) -> None:
    prompt, options = prompt_of(13), {"max_new_tokens": 20, "repetition_penalty": 1.7}
    plain = run(model, prompt, **options)
    masked = run(model, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, **options)
    assert torch.equal(plain.sequences, masked.sequences)


def test_repetition_penalty_of_batch_each_row_as_alone(model: RelayForMaskedDiffusion) -> None:
    prompts = prompts_of()
    together = run(model, padded(prompts, "mixed"), max_new_tokens=20, repetition_penalty=1.7).sequences[:, -20:]
    alone = [run(model, p[None], max_new_tokens=20, repetition_penalty=1.7).sequences[0, -20:] for p in prompts]
    assert torch.equal(together, torch.stack(alone))


def test_repetition_penalty_spreads_the_text(model: RelayForMaskedDiffusion) -> None:
    """Each block is told what the blocks before it say."""
    few, many = (
        len(set(run(model, prompt_of(5), max_new_tokens=48, repetition_penalty=p).sequences[0].tolist()))
        for p in (1.0, 3.0)
    )
    assert many > few + 5


# -- canvases --------------------------------------------------------------------------------------------------------

CANVAS = {"unmasking_policy": "confidence_threshold", "unmasking_threshold": 1.0}


@pytest.mark.parametrize(("length", "size"), [(14, 4), (3, 8)])
def test_canvas_not_of_whole_sub_blocks_with_cache_filled(make_model: Callable, length: int, size: int) -> None:
    canvas = blanked(length, length - 2, length - 1)[None]
    options = {"sub_block_size": size, "use_sub_block_cache": True, **CANVAS}
    output = run(make_model(block_size=None), canvas, **options)
    assert not (output.sequences == MASK).any()


@pytest.mark.parametrize(("length", "size"), [(14, 4), (3, 8), (13, 13), (9, 5)])
def test_canvas_not_of_whole_sub_blocks_filled(make_model: Callable, length: int, size: int) -> None:
    canvas = blanked(length, length - 2, length - 1)[None]
    output = run(make_model(block_size=None), canvas, sub_block_size=size, **CANVAS)
    assert not (output.sequences == MASK).any()


class Spy(LogitsProcessor):
    """Notes the share of masks that is left of the first row's canvas."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, cur_step: Tensor) -> Tensor:
        self.shares.append(float(cur_step[0]))
        return scores


def test_canvas_schedule_of_short_row_not_stretched_by_long_one(make_model: Callable) -> None:
    model, prompts, shares = make_model(block_size=None), [blanked(6, 1, 2, 4), blanked(14, 3, 9, 12, 13)], []
    for rows in (prompts[:1], prompts):
        spy = Spy()
        options = {"do_sample": True, "t_max": 3.0, "t_min": 0.2, "logits_processor": [spy]}
        run(model, padded(rows, "left"), sampling_seeds=list(range(len(rows))), **{**CANVAS, **options})
        shares.append(spy.shares[:3])
    assert shares[0] == pytest.approx([1, 2 / 3, 1 / 3])
    assert shares[1] == pytest.approx(shares[0])


# -- numbers that are none -------------------------------------------------------------------------------------------

NOTHING_LEFT = {"suppress_tokens": list(range(VOCAB_SIZE))}


@pytest.mark.parametrize(
    ("policy", "threshold"), [("confidence_threshold", 0.5), ("confidence_budget", 0.5), ("fixed_count", 2)]
)
def test_every_token_suppressed_ends(model: RelayForMaskedDiffusion, policy: str, threshold: float) -> None:
    fail_beyond(model, 20)
    output = run(model, prompt_of(10), max_new_tokens=5, unmasking_policy=policy, unmasking_threshold=threshold,
                 **NOTHING_LEFT)  # fmt: skip
    assert output.sequences.shape == (1, 15)


def test_every_token_suppressed_entropy_bound_ends(model: RelayForMaskedDiffusion) -> None:
    fail_beyond(model, 20)
    output = run(model, prompt_of(10), max_new_tokens=5, unmasking_policy="entropy_bound", **NOTHING_LEFT)
    assert not (output.sequences == MASK).any()


def test_weights_that_are_not_numbers_entropy_bound_ends(model: RelayForMaskedDiffusion) -> None:
    nn.init.constant_(model.lm_head.weight, torch.nan)
    fail_beyond(model, 20)
    output = run(model, prompt_of(10), max_new_tokens=5, unmasking_policy="entropy_bound")
    assert not (output.sequences == MASK).any()


def test_every_token_suppressed_mask_token_zero_ends(make_model: Callable) -> None:
    model = make_model(mask_token_id=0)
    fail_beyond(model, 20)
    output = run(model, torch.arange(1, 11)[None], max_new_tokens=5, pad_token_id=5, **NOTHING_LEFT)
    assert not (output.sequences == 0).any()


def test_every_token_suppressed_sampling_ends(model: RelayForMaskedDiffusion) -> None:
    output = run(model, prompt_of(10), max_new_tokens=5, do_sample=True, **NOTHING_LEFT)
    assert not (output.sequences == MASK).any()


# -- senseless options that are taken ---------------------------------------------------------------------------------

TAKEN: dict[str, dict[str, Any]] = {
    "mask token as stop token": {"eos_token_id": MASK},
    "scores": {"output_scores": True},
    "logits": {"output_logits": True},
    "positions": {"position_ids": torch.arange(10)[None] + 50},
    "positions to score": {"logits_to_keep": 3},
    "part of a token": {"max_new_tokens": 2.5},
    "no copies": {"num_return_sequences": 0, "do_sample": True},
    "contrastive sampling": {"penalty_alpha": 0.6, "do_sample": True},
    "no cache by number": {"use_cache": 0},
    "beam groups": {"num_beam_groups": 2},
    "chunked prefill": {"prefill_chunk_size": 4},
    "endless heat": {"t_max": float("inf"), "t_min": 1.0, "do_sample": True},
}


@pytest.mark.parametrize("name", TAKEN)
def test_generate_senseless_option_raises(model: RelayForMaskedDiffusion, name: str) -> None:
    with pytest.raises(ValueError, match="`"):
        run(model, prompt_of(10), **{"max_new_tokens": 5, **TAKEN[name]})


@pytest.mark.parametrize("how", ["policy that is a list", "no rows", "ids that are no whole numbers"])
def test_generate_wrong_type_raises_a_sentence(model: RelayForMaskedDiffusion, how: str) -> None:
    prompt, options = prompt_of(10), {}
    if how == "policy that is a list":
        options["unmasking_policy"] = ["fixed_count"]
    prompt = {"no rows": prompt[:0], "ids that are no whole numbers": prompt.float()}.get(how, prompt)
    with pytest.raises(ValueError, match="`"):
        run(model, prompt, max_new_tokens=5, **options)


def test_flat_schedule_with_bias_equals_temperature(model: RelayForMaskedDiffusion) -> None:
    options = {"max_new_tokens": 40, "do_sample": True, "sampling_seeds": [3], "sequence_bias": [[[3], 3.0]]}
    fixed, flat = (
        run(model, prompt_of(10), **options, **how) for how in ({"temperature": 0.5}, {"t_max": 0.5, "t_min": 0.5})
    )
    assert torch.equal(fixed.sequences, flat.sequences)


def test_criterion_behind_a_stop_token_of_the_block_changes_nothing(model: RelayForMaskedDiffusion) -> None:
    prompt = prompt_of(8)
    text = run(model, prompt, max_new_tokens=8).sequences[0, 8:].tolist()
    end = next(end for end in range(1, 5) if text[end - 1] not in text[: end - 1])
    later = [lambda ids, scores: ids.shape[1] >= 8 + end + 2]
    output = run(model, prompt, max_new_tokens=8, eos_token_id=text[end - 1], stopping_criteria=later)
    assert output.sequences[0, 8:].tolist() == text[:end]


# -- a cache whose run was interrupted --------------------------------------------------------------------------------


class InterruptedRunError(Exception):
    """Stands for a full memory, or a user's Ctrl-C."""


def interrupt(module: nn.Module, when: Callable[[], bool]) -> Any:
    def fail(module: nn.Module, arguments: tuple) -> None:
        if when():
            raise InterruptedRunError

    return module.register_forward_pre_hook(fail)


def note_forwards(model: RelayForMaskedDiffusion, commits: list[bool]) -> None:
    """Notes of each forward whether it commits: those ask for no inputs of the head."""
    model.register_forward_pre_hook(
        lambda module, arguments, kwargs: commits.append("unscored" not in kwargs), with_kwargs=True
    )


def test_cache_of_run_interrupted_in_a_commit_next_run_as_from_scratch(model: RelayForMaskedDiffusion) -> None:
    cache, prompt = RelayCache(config=model.config.text_config), prompt_of(13)
    text = run(model, prompt, max_new_tokens=27, cache=cache).sequences
    longer, seen = torch.cat([text, prompt], dim=1), iter([False, True])
    commits: list[bool] = []
    note_forwards(model, commits)
    handle = interrupt(model.model.layers[1], lambda: commits[-1] and next(seen))
    with pytest.raises(InterruptedRunError):
        run(model, longer, max_new_tokens=20, cache=cache)
    handle.remove()
    again = run(model, longer, max_new_tokens=20, cache=cache).sequences
    assert torch.equal(again, run(model, longer, max_new_tokens=20).sequences)


@pytest.mark.parametrize("options", [{}, {"fuse_commits": True}, {"use_sub_block_cache": True, "sub_block_size": 4}])
@pytest.mark.parametrize("forward", [1, 2, 5, 9])
def test_cache_of_run_interrupted_in_a_draft_next_run_as_from_scratch(
    model: RelayForMaskedDiffusion, options: dict[str, Any], forward: int
) -> None:
    cache, prompt, left = RelayCache(config=model.config.text_config), prompt_of(13), [forward]
    commits: list[bool] = []
    note_forwards(model, commits)

    def count() -> bool:
        left[0] -= not commits[-1]
        return not commits[-1] and left[0] == 0

    handle = interrupt(model.model.layers[1], count)
    with pytest.raises(InterruptedRunError):
        run(model, prompt, max_new_tokens=30, cache=cache, unmasking_threshold=1.0, **options)
    handle.remove()
    again = run(model, prompt, max_new_tokens=30, cache=cache, **options).sequences
    assert torch.equal(again, run(model, prompt, max_new_tokens=30, **options).sequences)


class ClosedStreamer:
    """Its client has left after some blocks."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks + 1  # and the prompt

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise InterruptedRunError

    def end(self) -> None: ...


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_cache_of_run_whose_streamer_failed_next_run_as_from_scratch(
    model: RelayForMaskedDiffusion, blocks: int, fuse: bool
) -> None:
    cache, options = RelayCache(config=model.config.text_config), {"max_new_tokens": 30, "fuse_commits": fuse}
    with pytest.raises(InterruptedRunError):
        run(model, prompt_of(13), cache=cache, streamer=ClosedStreamer(blocks), **options)
    again = run(model, prompt_of(13), cache=cache, **options).sequences
    assert torch.equal(again, run(model, prompt_of(13), **options).sequences)


def test_two_runs_of_one_model_leave_nothing_behind(model: RelayForMaskedDiffusion) -> None:
    """Options of one call, such as a schedule or a bias, do not reach the next."""
    inputs = padded(prompts_of(), "left")
    first = run(model, inputs, max_new_tokens=20).sequences
    run(model, inputs, max_new_tokens=9, do_sample=True, t_max=2.0, t_min=1.0, suppress_tokens=[3], eos_token_id=4,
        sampling_seeds=[1] * 5, fuse_commits=True, use_relay=False, pad_token_id=PAD)  # fmt: skip
    assert torch.equal(run(model, inputs, max_new_tokens=20).sequences, first)


@pytest.mark.parametrize(("mask", "pad"), [(0, None), (0, 0), (63, 63)])
@pytest.mark.parametrize("stop", [None, 7])
def test_generate_mask_token_as_padding_is_not_written(
    make_model: Callable, mask: int, pad: int | None, stop: int | None
) -> None:
    model = make_model(mask_token_id=mask, text={"pad_token_id": None})
    padding = padding_token(pad, [] if stop is None else [stop], mask)
    assert padding == (stop if stop is not None else 1 if mask == 0 else 0)
    # The first row ends at once, the second goes on: the first is padded.
    prompts = torch.tensor([[5, 6, 9], [8, 3, 2]])
    first = model.generate(prompts, max_new_tokens=16)[0, 3]
    written = model.generate(prompts, max_new_tokens=16, eos_token_id=int(first), pad_token_id=pad)
    assert written[0, 3] == first
    assert not bool((written == mask).any())
