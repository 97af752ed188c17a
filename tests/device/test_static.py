"""Static steps on the device: the CPU's tokens, no wait in any step, and the same launches in all of them."""

from typing import Any

import pytest
import torch

from relay_hf.modeling import generation_static_relay

from ..modeling.decoding import padded, prompts_of
from . import fakegpu
from .costs import BATCHES, CHANNELS, build_model

STEPS = ("denoise_step", "commit_step")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, int, int]]:
    """Name, waits and launches of every static step."""
    seen: set[tuple[str, int, int]] = set()

    def watch(name: str) -> None:
        step = getattr(generation_static_relay, name)

        def note(*arguments: Any) -> Any:
            with fakegpu.count() as counts:
                result = step(*arguments)
            seen.add((name, counts.waits.total(), counts.launches))
            return result

        monkeypatch.setattr(generation_static_relay, name, note)

    for name in STEPS:
        watch(name)
    return seen


@pytest.mark.parametrize("drawing", [{}, {"do_sample": True, "suppress_tokens": [4]}], ids=["greedy", "sampling"])
@pytest.mark.parametrize("channel", CHANNELS)
def test_static_steps_wait_for_nothing_and_launch_the_same(
    device: torch.device, counted: set, channel: str, drawing: dict[str, Any]
) -> None:
    model, prompts = build_model(2, channel, torch.float32).eval(), prompts_of(tuple(BATCHES["8 ragged"]))
    inputs = padded(prompts, "left")
    seeds = {"sampling_seeds": list(range(len(prompts)))} if drawing else {}
    options = {"max_new_tokens": 40, "unmasking_threshold": 0.05, "eos_token_id": [1, 2], **drawing, **seeds}
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    ours = model.generate(**on_device, cache_implementation="static", **options)
    assert torch.equal(ours.cpu(), model.cpu().generate(**inputs, **options))
    assert {name: waits for name, waits, _ in counted} == dict.fromkeys(STEPS, 0)
    assert len(counted) == len(STEPS)
