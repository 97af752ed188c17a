"""Rows of several calls in one decoder: each gets what it gets alone, whenever it comes and whoever comes and goes."""

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from relay_hf import RelayForMaskedDiffusion
from relay_hf.modeling.generation_blocks_relay import BlockDecoder
from relay_hf.modeling.generation_given_relay import GivenBatch

from ..conftest import MASK
from .decoding import PAD
from .test_generation_batches import MODELS, POLICIES, build, warpers

pytestmark = pytest.mark.usefixtures("without_warnings")


@pytest.fixture(scope="module")
def models() -> dict[str, RelayForMaskedDiffusion]:
    return {name: build(**options) for name, options in MODELS.items()}


class Arrival:
    """A call that comes when a decoder is about to decode its block number `border`.

    Args:
        border: that number.
        prompt: (1, P) tokens.
        options: of this call alone.
        leaves: blocks after which it is dropped; None = never.
    """

    def __init__(self, border: int, prompt: Tensor, options: dict[str, Any], leaves: int | None = None) -> None:
        self.border, self.prompt, self.options, self.leaves = border, prompt, options, leaves
        self.batch: GivenBatch | None = None


def decode_together(model: Any, arrivals: list[Arrival], options: dict[str, Any]) -> dict[int, Any]:
    """Decodes calls side by side as they come; outputs of those that are not dropped, by their number."""
    decoder: BlockDecoder | None = None
    outputs: dict[int, Any] = {}
    with torch.no_grad():
        for border in range(1000):
            for arrival in [a for a in arrivals if a.border == border]:
                new = model.block_decoder(arrival.prompt, **options, **arrival.options, return_dict_in_generate=True)
                (arrival.batch,) = new.grid.batches
                new.prefill()
                if decoder is not None and decoder.grid.ends:
                    assert decoder.can_join(new)
                    decoder.join(new)
                else:
                    decoder = new
            for arrival in [a for a in arrivals if a.leaves is not None and a.border + a.leaves == border]:
                if decoder is not None and arrival.batch in decoder.grid.batches:
                    decoder.drop(arrival.batch)
            if decoder is not None and decoder.grid.ends:
                for batch in decoder.step_block():
                    number = next(n for n, arrival in enumerate(arrivals) if arrival.batch is batch)
                    outputs[number] = decoder.output(batch)
            elif all(arrival.border <= border for arrival in arrivals):
                return outputs
    raise AssertionError("decoding does not end")


def assert_as_alone(model: Any, arrivals: list[Arrival], options: dict[str, Any], outputs: dict[int, Any]) -> None:
    for number, arrival in enumerate(arrivals):
        alone = model.generate(arrival.prompt, **options, **arrival.options, return_dict_in_generate=True)
        if number in outputs:
            ours = outputs[number]
            assert ours.sequences.tolist() == alone.sequences.tolist()
            for name in ("denoise_forwards", "commit_forwards", "prefill_forwards", "tokens_per_forward"):
                assert getattr(ours, name).tolist() == getattr(alone, name).tolist(), name
        else:
            assert arrival.leaves is not None


@st.composite
def arrivals(draw: st.DrawFn, is_canvas: bool, draws: bool) -> list[Arrival]:
    """One to five calls, of which canvases all come at once."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    calls = []
    for number in range(draw(st.integers(1, 5))):
        prompt = torch.randint(1, MASK, (1, draw(st.integers(1, 30))), generator=generator)
        own: dict[str, Any] = {"max_new_tokens": draw(st.integers(1, 40))}
        if draws:
            own["sampling_seeds"] = [draw(st.integers(-(2**63), 2**63 - 1))]
        leaves = draw(st.sampled_from((None, None, None, 1, 2)))
        border = 0 if is_canvas or number == 0 else draw(st.integers(0, 6))
        calls.append(Arrival(border, prompt, own, leaves))
    return calls


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[Arrival], dict[str, Any]]:
    """Model, calls, and the options that they share."""
    name = draw(st.sampled_from([name for name in MODELS if not name.startswith("canvas")]))
    policy = draw(st.sampled_from(list(POLICIES)))
    options: dict[str, Any] = {
        "unmasking_policy": policy,
        "unmasking_threshold": draw(st.sampled_from(POLICIES[policy])),
        "sub_block_size": draw(st.sampled_from((None, 2, 4, 8))),
        "use_relay": draw(st.sampled_from((True, True, False))),
        "eos_token_id": draw(st.sampled_from((None, 5, list(range(1, 8))))),
        "fuse_commits": draw(st.booleans()),
        "pad_token_id": PAD,
    }
    if policy == "time_schedule":
        options["denoising_steps"] = draw(st.integers(1, 6))
    options["relay_start"] = draw(st.sampled_from((None, "self"))) if options["use_relay"] else None
    options["use_sub_block_cache"] = draw(
        st.sampled_from((False, True, "prefix") if options["sub_block_size"] else (False,))
    )
    if draws := draw(st.booleans()):
        options |= {"do_sample": True, **draw(warpers())}
    return name, draw(arrivals(False, draws)), options


@settings(max_examples=60, phases=(Phase.explicit, Phase.generate))
@given(case=cases())
def test_join_at_any_border_each_call_as_alone(models: dict[str, Any], case: tuple) -> None:
    name, calls, options = case
    assert_as_alone(models[name], calls, options, decode_together(models[name], calls, options))


@pytest.mark.parametrize("name", ["shift", "no_shift_all"])
def test_drop_leaves_rows_that_begin_with_the_block_in_work(models: dict[str, Any], name: str) -> None:
    """The block that is to be committed goes with the row that it belongs to."""
    options = {"fuse_commits": True, "eos_token_id": None, "pad_token_id": PAD, "unmasking_threshold": 0.3}
    leaver = Arrival(0, torch.arange(1, 14)[None], {"max_new_tokens": 40}, leaves=2)
    newcomer = Arrival(2, torch.arange(1, 4)[None], {"max_new_tokens": 17})
    calls = [leaver, newcomer]
    outputs = decode_together(models[name], calls, options)
    assert list(outputs) == [1]
    assert_as_alone(models[name], calls, options, outputs)
