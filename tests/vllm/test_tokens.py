"""vLLM writes the tokens that `generate` writes, request by request, whatever they ask for and whatever runs beside."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

# Before what imports it.
pytest.importorskip("vllm", reason="vLLM is not installed: `make test-vllm` makes an environment that has it.")

from .engines import BLOCK, SURE, Request, assert_same, random_prompts

MODELS: dict[str, dict[str, Any]] = {
    "aligned": {},
    "shifted": {"token_shift": True},
    "shifted, all positions, no first state": {
        "token_shift": True,
        "relay_scope": "all",
        "relay_initial_state": "none",
    },
    "nothing carried": {"relay_channel": "none", "token_shift": True},
}
POLICIES: list[dict[str, Any]] = [
    {"unmasking_policy": "confidence_threshold", "unmasking_threshold": 0.1},
    {"unmasking_policy": "confidence_threshold", "unmasking_threshold": 0.9, "unmasking_count": 3},
    {"unmasking_policy": "confidence_threshold", "unmasking_threshold": 0.9, "denoising_steps": 3},
    {"unmasking_policy": "confidence_budget", "unmasking_threshold": 1.5},
    {"unmasking_policy": "fixed_count", "unmasking_threshold": 2},
    {"unmasking_policy": "fixed_count", "denoising_steps": 3, "unmasking_order": "margin"},
    {"unmasking_policy": "time_schedule", "denoising_steps": 4, "unmasking_order": "left_to_right"},
    {"unmasking_policy": "entropy_bound", "unmasking_threshold": 2.0},
]
DRAWN = {"do_sample": True, "temperature": 0.8, "top_k": 20, "unmasking_threshold": 0.3}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_prompts_of_every_remainder_and_lengths_of_1_to_50(engine: Callable, model: dict[str, Any]) -> None:
    prompts = random_prompts(*range(1, 3 * BLOCK + 2))
    lengths = itertools.cycle([1, 50, 2, 24, 7, 33, 8, 9, 41, 16, 5])
    answers = assert_same(engine(model), [Request(p, n) for p, n in zip(prompts, lengths, strict=False)])
    assert max(len(answer.tokens) for answer in answers) > 3 * BLOCK


@pytest.mark.parametrize("backbone", ["qwen3", "llama"])
def test_other_backbones(engine: Callable, backbone: str) -> None:
    requests = [Request(p, 20) for p in random_prompts(3, 8, 13, 21)]
    assert_same(engine({"backbone": backbone, "token_shift": True, "tie_word_embeddings": True}), requests)


@pytest.mark.parametrize("model", [MODELS["aligned"], MODELS["shifted"]], ids=["aligned", "shifted"])
def test_policies_and_sub_blocks_side_by_side(engine: Callable, model: dict[str, Any]) -> None:
    """One batch, in which no two requests have the same options."""
    sizes = itertools.cycle([BLOCK, 4, 2, 1])
    requests = [
        Request(prompt, 20, {**policy, "sub_block_size": size})
        for prompt, policy, size in zip(random_prompts(*range(5, 13)), POLICIES, sizes, strict=False)
    ]
    assert_same(engine(model), requests)


def test_drawn_tokens_are_those_of_the_same_seed(engine: Callable) -> None:
    prompts = random_prompts(5, 9, 16, 20)
    requests = [Request(p, 24, {**DRAWN, "sampling_seeds": [seed]}) for seed, p in enumerate(prompts)]
    requests.append(Request(prompts[0], 24, {**DRAWN, "sampling_seeds": [7], "t_max": 1.5, "t_min": 0.5}))
    requests[-1].options["temperature"] = 1.0
    mixed = [*requests, Request(prompts[0], 24)]
    answers = assert_same(engine(MODELS["shifted"]), mixed)
    assert len({tuple(answer.tokens) for answer in answers}) == len(answers)


def test_draws_without_a_seed_differ(engine: Callable) -> None:
    (prompt,) = random_prompts(6)
    first, second = engine(MODELS["shifted"]).serve([Request(prompt, 24, DRAWN), Request(prompt, 24, DRAWN)])
    assert first.tokens != second.tokens


def test_stop_tokens_of_each_request(engine: Callable) -> None:
    prompts = random_prompts(*range(4, 12), seed=8)
    free = engine(MODELS["shifted"]).expect([Request(p, 30, stops=()) for p in prompts])
    # A token from the middle of what would be written, so that every request stops somewhere else in its block.
    stops = [tuple({answer.tokens[6 + i], 60 - i}) for i, answer in enumerate(free)]
    requests = [Request(p, 30, stops=stop) for p, stop in zip(prompts, stops, strict=True)]
    answers = assert_same(engine(MODELS["shifted"]), requests)
    assert all(answer.tokens[-1] in stop for answer, stop in zip(answers, stops, strict=True))
    assert len({len(answer.tokens) % BLOCK for answer in answers}) > 2


def test_forwards_are_those_of_generate(engine: Callable) -> None:
    # A last block that begins with the last token takes a forward that `generate` does not need.
    requests = [Request(p, n, stops=()) for p, n in zip(random_prompts(5, 8, 11, 16), (20, 24, 30, 9), strict=True)]
    served = engine(MODELS["aligned"]).serve(requests)
    assert [a.forwards for a in served] == [a.forwards for a in engine(MODELS["aligned"]).expect(requests)]


def test_relay_that_is_off_for_one_request_leaves_others_alone(engine: Callable) -> None:
    (prompt,) = random_prompts(13)
    requests = [Request(prompt, 40, {**SURE, "use_relay": on}, stops=()) for on in (True, False, True)]
    on, off, again = assert_same(engine(MODELS["shifted"]), requests)
    assert on.tokens == again.tokens != off.tokens
