"""Compiled static steps: the same tokens, one graph per step, and few graphs whatever the lengths.

Graphs are counted by a backend that runs them as they are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from relay_hf import RelayForMaskedDiffusion

from .decoding import padded, prompt_of, prompts_of, run
from .test_generation_static import assert_same

pytestmark = pytest.mark.usefixtures("without_warnings")
GRAPHS: list[int] = []


def counting(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable:
    """A function, because transformers copies the configuration, and with it an object."""
    GRAPHS.append(len(graph.graph.nodes))
    return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    GRAPHS.clear()
    yield
    torch._dynamo.reset()


def compiled(backend: Any = counting, mode: str | None = None) -> dict[str, Any]:
    config = CompileConfig(fullgraph=True, backend=backend, mode=mode)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@pytest.fixture
def model(make_model: Callable) -> RelayForMaskedDiffusion:
    return make_model(
        open_channel=True, token_shift=True, text={"num_hidden_layers": 1, "max_position_embeddings": 4096}
    )


def test_compiled_static_steps_graphs_do_not_grow_with_the_text(model: RelayForMaskedDiffusion) -> None:
    """One row: a step and a commit of the first memory length, and both for all others."""
    for length, graphs in ((13, 2), (3, 2), (300, 4), (1500, 4)):
        expected = run(model, prompt_of(length), max_new_tokens=20)
        assert_same(run(model, prompt_of(length), max_new_tokens=20, **compiled()), expected)
        assert len(GRAPHS) == graphs
    assert not counters["graph_break"]


def test_compiled_static_steps_batches_few_graphs(model: RelayForMaskedDiffusion) -> None:
    """Rows that leave make smaller batches, which share their graphs."""
    for lengths in ((3, 8, 13, 27, 16), (400, 300, 17), (9, 20)):
        inputs = padded(prompts_of(lengths), "left")
        options = {"max_new_tokens": 20, "eos_token_id": [1, 2, 3]}
        assert_same(run(model, inputs, **options, **compiled()), run(model, inputs, **options))
    assert len(GRAPHS) <= 8
    first = len(GRAPHS)
    run(model, inputs, **options, **compiled())
    assert len(GRAPHS) == first


@pytest.mark.parametrize("channel", ["none", "residual_context", "soft_mask"])
def test_compiled_static_steps_every_channel_one_graph(make_model: Callable, channel: str) -> None:
    model = make_model(open_channel=True, relay_channel=channel, text={"num_hidden_layers": 1})
    expected = run(model, prompt_of(13), max_new_tokens=11)
    assert_same(run(model, prompt_of(13), max_new_tokens=11, **compiled()), expected)
    assert len(GRAPHS) == 2


def test_compiled_static_steps_drawing_one_graph(model: RelayForMaskedDiffusion) -> None:
    drawing = {"do_sample": True, "sampling_seeds": [7], "top_p": 0.9, "temperature": 2.0, "suppress_tokens": [4]}
    for _ in range(2):
        expected = run(model, prompt_of(13), max_new_tokens=11, **drawing)
        assert_same(run(model, prompt_of(13), max_new_tokens=11, **drawing, **compiled()), expected)
    assert len(GRAPHS) == 2


def test_static_steps_cpu_is_not_compiled_by_itself(model: RelayForMaskedDiffusion) -> None:
    """As in transformers, where only accelerators compile unless a test forces it."""
    config = CompileConfig(backend=counting)
    run(model, prompt_of(13), max_new_tokens=11, cache_implementation="static", compile_config=config)
    assert not GRAPHS


@pytest.mark.slow
def test_static_steps_compiled_by_inductor_same_text(model: RelayForMaskedDiffusion) -> None:
    expected = run(model, prompt_of(13), max_new_tokens=20)
    assert_same(run(model, prompt_of(13), max_new_tokens=20, **compiled("inductor")), expected)
