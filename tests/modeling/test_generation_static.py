"""Static steps write what ordinary ones write, in few shapes, at fixed addresses, and without a wait inside."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config

from relay_hf import RelayCache, RelayConfig, RelayForMaskedDiffusion, RelayGenerateOutput
from relay_hf.modeling import generation_static_relay
from relay_hf.modeling.cache_static_relay import coarse

from ..conftest import MASK
from .decoding import padded, prompt_of, prompts_of, run
from .test_generation_waits import counting_waits
from .test_threads import at_once

pytestmark = pytest.mark.usefixtures("without_warnings")

POLICIES: dict[str, dict[str, Any]] = {
    "threshold": {},
    "small sub-blocks": {"sub_block_size": 2},
    "whole block": {"sub_block_size": None},
    "dynamic": {"denoising_steps": 3},
    "budget": {"unmasking_policy": "confidence_budget"},
    "fixed count": {"unmasking_policy": "fixed_count", "unmasking_threshold": 2, "unmasking_order": "margin"},
    "schedule": {"unmasking_policy": "time_schedule", "denoising_steps": 5, "unmasking_order": "entropy"},
    "entropy": {"unmasking_policy": "entropy_bound"},
}
DRAWING: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 2.0},
    "warpers": {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "epsilon_cutoff": 0.001},
    "schedule": {"t_max": 2.0, "t_min": 0.5},
    "biases": {"sequence_bias": [[[5], 2.0]], "bad_words_ids": [[3]], "suppress_tokens": [4, 9]},
}
CHANNELS = ("layer_norm", "none", "residual_context", "soft_mask")


def even(length: int = 13) -> Tensor:
    return prompts_of((length,))[0].expand(3, -1)


def assert_same(ours: RelayGenerateOutput, expected: RelayGenerateOutput) -> None:
    assert torch.equal(ours.sequences, expected.sequences)
    for name in ("denoise_forwards", "commit_forwards", "prefill_forwards"):
        assert torch.equal(getattr(ours, name), getattr(expected, name))


def check(model: RelayForMaskedDiffusion, inputs: Any, **options: Any) -> RelayGenerateOutput:
    """Decodes both ways, and returns what static steps wrote."""
    options = {"max_new_tokens": 30, **options}
    expected = run(model, inputs, **options)
    ours = run(model, inputs, cache_implementation="static", **options)
    assert_same(ours, expected)
    return ours


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("channel", CHANNELS)
def test_static_steps_every_channel_same_text(make_model: Callable, channel: str, token_shift: bool) -> None:
    model = make_model(open_channel=True, token_shift=token_shift, relay_channel=channel)
    check(model, padded(prompts_of(), "mixed"))
    check(model, prompt_of(13), max_new_tokens=11, use_relay=False)


@pytest.mark.parametrize("policy", POLICIES)
def test_static_steps_every_policy_same_text(make_model: Callable, policy: str) -> None:
    model = make_model(open_channel=True, token_shift=True, relay_initial_state="none")
    check(model, padded(prompts_of(), "left"), **POLICIES[policy])


@pytest.mark.parametrize("drawing", DRAWING)
def test_static_steps_drawing_same_text(make_model: Callable, drawing: str) -> None:
    model = make_model(open_channel=True, token_shift=False)
    seeds = {"do_sample": True, "sampling_seeds": [5, 6, 7, 8, 9]}
    check(model, padded(prompts_of(), "right"), **seeds, **DRAWING[drawing])


@pytest.mark.parametrize("token_shift", [False, True])
def test_static_steps_rows_that_end_early_same_text(make_model: Callable, token_shift: bool) -> None:
    """Ended rows take part in no step, and are dropped when half of the rows are enough."""
    model = make_model(open_channel=True, token_shift=token_shift)
    output = check(model, padded(prompts_of(), "mixed"), max_new_tokens=50, eos_token_id=list(range(1, 8)))
    assert output.commit_forwards.min() < output.commit_forwards.max()


def test_static_steps_short_prompt_same_text(make_model: Callable) -> None:
    """Without a prefill, nothing has said yet how large keys and values are."""
    check(make_model(open_channel=True, token_shift=True), prompt_of(3))


def test_static_steps_history_same(make_model: Callable) -> None:
    model, inputs = make_model(open_channel=True, token_shift=True), padded(prompts_of(), "mixed")
    options = {"max_new_tokens": 30, "output_history": True, "eos_token_id": 5}
    expected = run(model, inputs, **options).history
    ours = run(model, inputs, cache_implementation="static", **options).history
    assert torch.equal(ours.revealed_at, expected.revealed_at)
    assert torch.equal(ours.given, expected.given)
    torch.testing.assert_close(ours.confidence, expected.confidence, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("new_tokens", [0, 14])
@pytest.mark.parametrize("sub_block_size", [None, 4])
def test_static_steps_canvas_same_text(make_model: Callable, sub_block_size: int | None, new_tokens: int) -> None:
    model, inputs = make_model(open_channel=True, block_size=None), padded(prompts_of((30, 45, 17)), "left")
    inputs["input_ids"][:, -12::3] = MASK
    options = {"max_new_tokens": new_tokens} if new_tokens else {"max_new_tokens": None}
    check(model, inputs, sub_block_size=sub_block_size, **options)


@torch.no_grad()
def test_static_steps_learned_positions_canvas_stays_within_them() -> None:
    """Its width would be rounded up to more positions than there are."""
    text = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=40, initializer_range=0.5)
    config = RelayConfig(text_config=text, mask_token_id=MASK, block_size=None, token_shift=False)
    model = RelayForMaskedDiffusion(config).eval()
    check(model, torch.cat([prompt_of(20), torch.full((1, 17), MASK)], dim=1), max_new_tokens=None)


def test_static_steps_turns_of_a_chat_same_cache(make_model: Callable) -> None:
    """Turns of both kinds may follow each other: what a cache holds is the same."""
    model, texts = make_model(open_channel=True, token_shift=True), []
    for kinds in (("static", "static"), ("static", None), (None, "static"), (None, None)):
        cache, text = RelayCache(config=model.config.text_config), prompt_of(13)
        for kind in kinds:
            output = run(model, text, cache=cache, max_new_tokens=20, cache_implementation=kind)
            text = torch.cat([output.sequences, prompt_of(9)], dim=1)
        texts.append(text.tolist())
        assert type(cache.layers[0]).__name__ == "RelayLayer"
        assert cache.layers[0].memory[0].shape[2] == cache.get_seq_length()
    assert all(text == texts[0] for text in texts)


class Drafts:
    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def put(self, tokens: Tensor) -> None:
        self.seen.append(tokens.flatten().tolist())

    put_draft = put

    def end(self) -> None:
        self.seen.append([])


def test_static_steps_streamer_sees_the_same_drafts(make_model: Callable) -> None:
    model, seen = make_model(open_channel=True, token_shift=True), []
    for kind in (None, "static"):
        streamer = Drafts()
        model.generate(prompt_of(13), max_new_tokens=20, streamer=streamer, cache_implementation=kind)
        seen.append(streamer.seen)
    assert seen[0] == seen[1]


# -- shapes, addresses, waits ---------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """Of each static step: shapes and addresses of all that it is given, and the waits inside."""
    seen: list[tuple[Any, int]] = []
    step = generation_static_relay.denoise_step

    def note(model: Any, block: Any, memory: Any, *others: Any) -> Tensor:
        tensors = [*vars(block).values(), *itertools.chain.from_iterable(memory)]
        with counting_waits(monkeypatch) as waits:
            result = step(model, block, memory, *others)
        seen.append(([(t.data_ptr(), tuple(t.shape), t.stride()) for t in tensors], waits.count + waits.lists))
        return result

    monkeypatch.setattr(generation_static_relay, "denoise_step", note)
    return seen


@pytest.mark.parametrize("channel", CHANNELS)
def test_static_step_waits_for_nothing(make_model: Callable, watched: list, channel: str) -> None:
    model = make_model(open_channel=True, token_shift=True, relay_channel=channel)
    for options in (*POLICIES.values(), *({"do_sample": True, **drawing} for drawing in DRAWING.values())):
        inputs = padded(prompts_of(), "left")
        run(model, inputs, max_new_tokens=10, eos_token_id=[1, 2], cache_implementation="static", **options)
    assert len(watched) > 20
    assert {waits for _, waits in watched} == {0}


def test_static_steps_of_all_calls_find_everything_where_it_was(make_model: Callable, watched: list) -> None:
    model = make_model(open_channel=True, token_shift=True)
    for length in (100, 3, 30):
        run(model, prompt_of(length), max_new_tokens=40, cache_implementation="static")
    assert len(watched) > 20
    places = [place for place, _ in watched]
    assert all(place == places[0] for place in places)


def test_static_steps_larger_text_gets_larger_memory_once(make_model: Callable, watched: list) -> None:
    model = make_model(open_channel=True, token_shift=True, text={"max_position_embeddings": 2048})
    for length in (30, 300, 30, 300):
        run(model, prompt_of(length), max_new_tokens=10, cache_implementation="static")
    assert len({place[0] for place, _ in watched}) == 2


def test_coarse_lengths_are_few_and_close() -> None:
    lengths = {coarse(length, 256) for length in range(1, 32769)}
    assert len(lengths) <= 18
    assert all(0 <= coarse(length, 256) - length < max(256, length / 2) for length in range(1, 32769))


def test_static_steps_in_threads_each_have_their_own_memory(make_model: Callable) -> None:
    model = make_model(open_channel=True, token_shift=True)
    prompts = [prompt_of(length) for length in (3, 8, 13, 17)]
    expected = [model.generate(prompt, max_new_tokens=20) for prompt in prompts]
    calls = [
        lambda prompt=prompt: model.generate(prompt, max_new_tokens=20, cache_implementation="static")
        for prompt in prompts
    ]
    for ours, theirs in zip(at_once(calls), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_static_memory_taken_in_inference_mode_serves_outside(make_model: Callable) -> None:
    model = make_model(open_channel=True, token_shift=True)
    with torch.inference_mode():
        expected = run(model, prompt_of(13), cache_implementation="static", max_new_tokens=20)
    assert_same(run(model, prompt_of(13), cache_implementation="static", max_new_tokens=20), expected)


def test_static_memory_is_not_copied_with_the_model(make_model: Callable) -> None:
    model = make_model()
    run(model, prompt_of(13), cache_implementation="static", max_new_tokens=20)
    twin = copy.deepcopy(model)
    assert len(model.static_rooms.kept) == 1
    assert not twin.static_rooms.kept
    assert model.state_dict().keys() == twin.state_dict().keys()


# -- what cannot be static ------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sub-block cache": ({"use_sub_block_cache": True}, "`use_sub_block_cache=True` .*`cache_implementation='static'`"),
    "fused commits": ({"fuse_commits": True}, "`fuse_commits=True`"),
    "start": ({"relay_start": "self"}, "`relay_start='self'`"),
    "penalty": ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
    "eta": ({"eta_cutoff": 0.01, "do_sample": True}, "EtaLogitsWarper"),
    "own processor": ({"logits_processor": [lambda ids, scores: scores]}, "function"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_static_steps_refuse_before_any_forward(make_model: Callable, case: str) -> None:
    options, message = REFUSED[case]
    model = make_model(open_channel=True)
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(ValueError, match=message):
        run(model, prompt_of(9), cache_implementation="static", max_new_tokens=9, **options)


def test_static_steps_refuse_other_attention(make_model: Callable) -> None:
    model = make_model()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"`attn_implementation=.eager.` .* `model\.set_attn_implementation"):
        run(model, prompt_of(9), cache_implementation="static", max_new_tokens=9)
