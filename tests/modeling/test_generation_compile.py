"""`torch.compile` under `generate`: the same tokens, no graph break, and no graph for every block or call.

Graphs are counted by a backend that runs them as they are. Their number depends on the kinds of forwards (prefill,
draft without a prefix, draft, commit, and those of the sub-block cache), not on how many there are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters

from relay_hf import RelayForMaskedDiffusion, RelayGenerateOutput

from .decoding import padded, prompt_of, prompts_of, run

CACHED = {"sub_block_size": 4, "use_sub_block_cache": True}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Compiled code outlives its module, and would count here."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class CountingBackend:
    """Runs graphs eagerly and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable:
        self.count += 1
        return graph.forward


@pytest.fixture
def model(make_model: Callable) -> RelayForMaskedDiffusion:
    return make_model(open_channel=True, token_shift=True, text={"num_hidden_layers": 1})


def assert_same(ours: RelayGenerateOutput, expected: RelayGenerateOutput) -> None:
    assert torch.equal(ours.sequences, expected.sequences)
    for name in ("denoise_forwards", "commit_forwards", "prefill_forwards"):
        assert torch.equal(getattr(ours, name), getattr(expected, name))


def check(
    model: RelayForMaskedDiffusion, part: torch.nn.Module, inputs: dict[str, Tensor] | Tensor, most: int, **options: Any
) -> None:
    """Compiles `part`, compares three calls with those of the plain model, and counts graphs."""
    fewer, more = {"max_new_tokens": 20, **options}, {"max_new_tokens": 52, **options}
    expected = run(model, inputs, **fewer), run(model, inputs, **more)
    backend = CountingBackend()
    part.compile(backend=backend, fullgraph=True, dynamic=True)
    assert_same(run(model, inputs, **fewer), expected[0])
    assert 0 < backend.count <= most
    first = backend.count
    assert_same(run(model, inputs, **fewer), expected[0])
    assert backend.count == first
    # Four blocks more: only a batch whose rows leave one by one may meet a new kind of forward, that of one row.
    assert_same(run(model, inputs, **more), expected[1])
    assert backend.count <= first + (not isinstance(inputs, Tensor))
    assert not counters["graph_break"]
    assert not counters["unimplemented"]


def test_compiled_backbone_one_row_same_text_and_few_graphs(model: RelayForMaskedDiffusion) -> None:
    check(model, model.model, prompt_of(13), most=5)


def test_compiled_backbone_padded_batch_same_text_and_few_graphs(model: RelayForMaskedDiffusion) -> None:
    """Rows that wait are left out, so that there are forwards over all rows, over several and over one."""
    with dynamo_config.patch(recompile_limit=16):
        check(model, model.model, padded(prompts_of(), "left"), most=8)


def test_compiled_backbone_sub_block_cache_needs_a_higher_limit(model: RelayForMaskedDiffusion) -> None:
    """Ten kinds of forwards, of which dynamo by itself compiles eight and gives up."""
    with dynamo_config.patch(recompile_limit=16):
        check(model, model.model, prompt_of(13), most=10, **CACHED)


@torch.no_grad()
def test_compiled_backbone_prefill_of_any_length_is_one_graph(model: RelayForMaskedDiffusion) -> None:
    backend = CountingBackend()
    prompts = [prompt_of(length) for length in (40, 64, 16, 96)]
    expected = [model(prompt).logits for prompt in prompts]
    model.model.compile(backend=backend, fullgraph=True, dynamic=True)
    for prompt, logits in zip(prompts, expected, strict=True):
        torch.testing.assert_close(model(prompt).logits, logits, atol=1e-5, rtol=1e-5)
    assert backend.count == 1


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["row", "even", "padded"])
@pytest.mark.parametrize("options", [{}, {"fuse_commits": True}, CACHED])
def test_compiled_model_same_text_and_few_graphs(
    model: RelayForMaskedDiffusion, shape: str, options: dict[str, Any]
) -> None:
    """The whole model, with channel and head."""
    even = prompts_of((13,))[0].expand(3, -1)
    inputs = {"row": prompt_of(13), "even": even, "padded": padded(prompts_of(), "left")}[shape]
    with dynamo_config.patch(recompile_limit=32):
        expected = run(model, inputs, max_new_tokens=30, **options)
        backend = CountingBackend()
        model.compile(backend=backend, dynamic=True)
        assert_same(run(model, inputs, max_new_tokens=30, **options), expected)
        first = backend.count
        assert_same(run(model, inputs, max_new_tokens=30, **options), expected)
        assert backend.count == first
        assert first <= 18
        assert not counters["graph_break"]


@pytest.mark.slow
def test_backbone_compiled_by_inductor_same_text(model: RelayForMaskedDiffusion) -> None:
    expected = run(model, prompt_of(13), max_new_tokens=20)
    model.model.compile(fullgraph=True, dynamic=True)
    assert_same(run(model, prompt_of(13), max_new_tokens=20), expected)
