"""What the scheduler does to a request does not change its text: chunks, preemption, other requests, shared pages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

# Before what imports it.
pytest.importorskip("vllm", reason="vLLM is not installed: `make test-vllm` makes an environment that has it.")

from .engines import BLOCK, SURE, Engine, Request, assert_same, random_prompts, read

SHIFTS = pytest.mark.parametrize("token_shift", [False, True], ids=["aligned", "shifted"])


@SHIFTS
@pytest.mark.parametrize("budget", [BLOCK, 20])
def test_prompts_in_chunks(engine: Callable, token_shift: bool, budget: int) -> None:
    """A step has room for a block or two: prompts come in chunks, between steps of other requests."""
    requests = [Request(p, n) for p, n in zip(random_prompts(3, 40, 17, 24, 31), (20, 9, 17, 8, 12), strict=True)]
    small = engine({"token_shift": token_shift}, max_num_batched_tokens=budget, max_num_seqs=min(budget, 5))
    assert_same(small, requests)


@pytest.mark.parametrize("shares", [False, True], ids=["own pages", "shared pages"])
@SHIFTS
def test_preempted_requests(engine: Callable, token_shift: bool, shares: bool) -> None:
    """Eight texts of up to four pages share eight pages; also drawn ones go on as if nothing had happened."""
    prompts = random_prompts(*range(12, 20))
    drawn = {"do_sample": True, "unmasking_threshold": 0.3}
    options = [SURE if i % 2 else {**drawn, "sampling_seeds": [i]} for i in range(len(prompts))]
    requests = [Request(p, 100, o, stops=()) for p, o in zip(prompts, options, strict=True)]
    small = engine({"token_shift": token_shift}, num_gpu_blocks_override=9, enable_prefix_caching=shares)
    before = small.metric("vllm:num_preemptions")
    assert_same(small, requests)
    assert small.metric("vllm:num_preemptions") - before >= 4


def test_aborted_request_leaves_its_neighbours_alone(engine: Callable) -> None:
    served: Engine = engine({"token_shift": True})
    core, answers = served.llm.llm_engine, {}
    requests = [Request(p, 40, stops=()) for p in random_prompts(5, 13, 20)]
    for i, request in enumerate(requests):
        core.add_request(f"request-{i}", {"prompt_token_ids": request.prompt}, served.params(request))
    for step in range(200):
        if step == 4:  # in the middle of a block
            core.abort_request(["request-1"])
        for output in core.step():
            if output.finished and output.outputs[0].finish_reason != "abort":
                answers[output.request_id] = read(output).tokens
        if not core.has_unfinished_requests():
            break
    expected = [answer.tokens for answer in served.expect(requests)]
    assert sorted(answers.values()) == sorted([expected[0], expected[2]])
    # Its row serves the next request.
    assert_same(served, requests)


@pytest.mark.parametrize(
    "model",
    [{}, {"token_shift": True}, {"token_shift": True, "relay_scope": "all"}],
    ids=["aligned", "shifted", "shifted, all positions"],
)
def test_shared_pages(engine: Callable, model: dict[str, Any]) -> None:
    """Prompts with a common beginning: pages are found, and only where all blocks in them are final for the request."""
    (common,) = random_prompts(96)
    rests = random_prompts(0, 1, 7, 8, 9, 32, 40, seed=6)
    requests = [Request(common + rest, 24, stops=()) for rest in rests]
    # Prompts that end on a page, in it, and in a block that another one has whole.
    requests += [Request(common[:n], 24, stops=()) for n in (32, 33, 36, 64, 72)]
    cached: Engine = engine(model, enable_prefix_caching=True)
    before = cached.metric("vllm:prefix_cache_hits")
    assert_same(cached, requests)
    assert_same(cached, requests[::-1])  # by now, everything has been computed once
    assert cached.metric("vllm:prefix_cache_hits") - before > 96


def test_pages_that_cut_blocks_are_not_shared(engine: Callable) -> None:
    (common,) = random_prompts(96)
    requests = [Request(common, 24, {**SURE, "sub_block_size": 16}, stops=()), Request(common[:90], 24, stops=())]
    cached: Engine = engine({"block_size": 48}, enable_prefix_caching=True, max_num_batched_tokens=96)
    before = cached.metric("vllm:prefix_cache_hits")
    assert_same(cached, requests)
    assert_same(cached, requests)
    assert cached.metric("vllm:prefix_cache_hits") == before


def test_last_block_ends_with_the_last_position(engine: Callable) -> None:
    """60 positions hold seven blocks of eight: a text may fill these, and not one token more."""
    short: Engine = engine({"token_shift": True}, max_model_len=60)
    (prompt,) = random_prompts(20)
    (answer,) = assert_same(short, [Request(prompt, 36, stops=())])
    assert len(answer.tokens) == 36
    (capped,) = short.serve([Request(prompt, 50, stops=())])
    assert capped.tokens == answer.tokens


def test_several_texts_of_a_request_are_drawn_apart(engine: Callable) -> None:
    served: Engine = engine({"token_shift": True})
    (prompt,) = random_prompts(6)
    request = Request(prompt, 24, {"do_sample": True, "unmasking_threshold": 0.3}, stops=())
    (output,) = served.llm.generate([{"prompt_token_ids": prompt}], served.params(request, n=3), use_tqdm=False)
    assert len({tuple(text.token_ids) for text in output.outputs}) == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pipeline_parallel_size": 2}, "`pipeline_parallel_size=2` is not supported"),
        ({"async_scheduling": True}, "`async_scheduling=True` plans a step"),
        ({"max_model_len": 5}, "`max_model_len=5` has no room for a block of 8"),
        ({"max_num_batched_tokens": 7, "max_num_seqs": 2}, "`max_num_batched_tokens=7` has no room for a block of 8"),
        ({"model": {"relay_channel": "residual_context"}}, "`relay_channel='residual_context'` is not supported"),
        ({"model": {"relay_readout": "pre_norm"}}, "`relay_readout='pre_norm'` reads a layer"),
        ({"model": {"block_size": None}}, "`block_size=None` makes the text one canvas"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_engine_that_cannot_serve_says_so(engine: Callable, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Exception, match=sentence):
        engine(**options)


def test_half_precision_decides_by_single(engine: Callable) -> None:
    """Weights in bf16: vLLM rounds its sums elsewhere than transformers, but thresholds are read in fp32."""
    half: Engine = engine({"token_shift": True}, dtype="bfloat16")
    runner = half.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    logits = runner.model.compute_logits(torch.zeros(2, 64, dtype=torch.bfloat16))
    assert logits.dtype == torch.float32
    (prompt,) = random_prompts(9)
    (answer,) = half.serve([Request(prompt, 24, stops=())])
    assert len(answer.tokens) == 24


@pytest.mark.parametrize(
    "model", [{}, {"token_shift": True, "relay_scope": "all"}], ids=["aligned", "shifted, all positions"]
)
def test_what_vllm_runs_before_it_serves_on_a_gpu(engine: Callable, model: dict[str, Any]) -> None:
    """Steps that warm kernels up, with grammars; memory that is measured; batches that graphs are captured with."""
    from triton.language import max as of_triton
    from triton.runtime import JITFunction
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels

    if isinstance(of_triton, JITFunction):
        pytest.skip("Triton was imported before it could be set to interpret: `make test-vllm` does that.")
    served: Engine = engine(model)
    worker = served.llm.llm_engine.model_executor.driver_worker.worker
    runner = worker.model_runner
    for _ in range(2):
        warmup_kernels(runner, worker.execute_model, worker.sample_tokens)
        run_mixed_prefill_decode_warmup(runner, worker.execute_model, worker.sample_tokens, 64)
        runner.profile_run()
        runner._dummy_run(64, uniform_decode=True)
    assert runner.model_state.rows.options == {}  # none of it is left
    assert_same(served, [Request(prompt, 20) for prompt in random_prompts(3, 9, 16)])
