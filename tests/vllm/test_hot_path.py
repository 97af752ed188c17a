"""What a step does beside the network does not grow with the number of requests, and never waits for the device."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

# Before what imports it.
pytest.importorskip("vllm", reason="vLLM is not installed: `make test-vllm` makes an environment that has it.")

from torch.utils._python_dispatch import TorchDispatchMode

from .engines import SURE, Engine, Request, assert_same, random_prompts

# Operations that ask the device for a number, and so wait for it.
WAITS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.item.default", "aten.masked_select.default"}


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Looking at the same numbers in another shape costs nothing.
        self.found[str(func)] += not func.is_view
        return func(*args, **(kwargs or {}))


def operations_of_steps(engine: Engine, requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """The operations of each step in the preparation of inputs and in the sampler."""
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    steps: list[Counter[str]] = []
    prepare, sample = type(runner.model_state).prepare_inputs, type(runner.sampler).__call__

    def counted(function: Callable[..., Any], begins: bool) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with Operations() as operations:
                result = function(*args)
            if begins:
                steps.append(Counter())
            steps[-1] += operations.found
            return result

        return run

    with monkeypatch.context() as patch:
        patch.setattr(type(runner.model_state), "prepare_inputs", counted(prepare, begins=True))
        patch.setattr(type(runner.sampler), "__call__", counted(sample, begins=False))
        engine.serve(requests)
    return steps


@pytest.mark.parametrize("token_shift", [False, True], ids=["aligned", "shifted"])
def test_operations_do_not_grow_with_requests(
    engine: Callable, token_shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: Engine = engine({"token_shift": token_shift})
    options = {"unmasking_policy": "fixed_count", "unmasking_threshold": 2}
    (prompt,) = random_prompts(16)
    found = {}
    for count in (1, 8):
        requests = [Request(prompt, 32, options, stops=()) for _ in range(count)]
        found[count] = operations_of_steps(served, requests, monkeypatch)
    assert len(found[1]) == len(found[8]) > 10  # all denoise and commit together
    few, many = (found[count][3] for count in (1, 8))
    assert +few == +many
    assert sum(many.values()) < 250
    assert not WAITS & {name for step in found[8] for name in step}


def test_logits_come_a_piece_at_a_time(engine: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests run: memory for logits is that of so many positions."""
    served: Engine = engine({"token_shift": True})
    runner = served.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    rows: list[int] = []
    plain = runner.model.logits_of

    def counted(head_inputs: Any) -> Any:
        rows.append(len(head_inputs))
        return plain(head_inputs)

    monkeypatch.setattr(runner.sampler, "at_once", 3)
    monkeypatch.setattr(runner.model, "logits_of", counted)
    drawn = {"do_sample": True, "sampling_seeds": [1], "unmasking_threshold": 0.3}
    assert_same(served, [Request(p, 20, o) for p, o in zip(random_prompts(3, 9, 16), ({}, drawn, SURE), strict=True)])
    assert max(rows) == 3
