"""No row of a batch depends on its neighbours, nor on where it stands among them, whatever the options."""

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from relay_hf import RelayConfig, RelayForMaskedDiffusion, RelayGenerateOutput
from relay_hf.modeling.unmasking_relay import ORDERS

from ..conftest import MASK, text_config
from .decoding import PAD, padded

pytestmark = pytest.mark.usefixtures("without_warnings")

MODELS: dict[str, dict[str, Any]] = {
    "shift": {"token_shift": True},
    "shift_all_none": {"token_shift": True, "relay_scope": "all", "relay_initial_state": "none"},
    "no_shift": {"token_shift": False},
    "no_shift_all": {"token_shift": False, "relay_scope": "all", "relay_readout": "pre_norm"},
    "canvas": {"block_size": None},
    "canvas_shift_all": {"block_size": None, "token_shift": True, "relay_scope": "all"},
}
POLICIES = {
    "confidence_threshold": (0.0, 0.3, 1.0),
    "confidence_budget": (0.0, 0.9, 3.0),
    "fixed_count": (1, 3),
    "time_schedule": (0.5,),
    "entropy_bound": (0.0, 2.0, 5.0),
}


@pytest.fixture(scope="module")
def models() -> dict[str, RelayForMaskedDiffusion]:
    return {name: build(**options) for name, options in MODELS.items()}


def build(**options: Any) -> RelayForMaskedDiffusion:
    torch.manual_seed(0)
    fields = {"block_size": 8, "mask_token_id": MASK, **options}
    model = RelayForMaskedDiffusion(RelayConfig(text_config=text_config(), **fields)).eval()
    torch.nn.init.normal_(model.relay.norm.weight, std=0.7)
    # In fp32 rounding depends on the batch, and the relay amplifies it until tokens turn over.
    return model.double()


@st.composite
def batches(draw: st.DrawFn) -> tuple[str, list[Tensor], str, int, dict[str, Any]]:
    """Model, prompts, side of the padding, copies of each prompt, options."""
    name = draw(st.sampled_from(list(MODELS)))
    is_canvas = name.startswith("canvas")
    count = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(1, 20), min_size=count, max_size=count))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    prompts = [torch.randint(1, MASK, (length,), generator=generator) for length in lengths]
    if is_canvas:
        for prompt in prompts:
            prompt[torch.rand(len(prompt), generator=generator) < 0.3] = MASK
    policy = draw(st.sampled_from(list(POLICIES)))
    options: dict[str, Any] = {
        "max_new_tokens": draw(st.integers(1, 20)),
        "unmasking_policy": policy,
        "unmasking_threshold": draw(st.sampled_from(POLICIES[policy])),
        "sub_block_size": draw(st.sampled_from((None, 1, 2, 4, 8))),
        "use_relay": draw(st.sampled_from((True, True, False))),
        "eos_token_id": draw(st.sampled_from((None, 5, list(range(1, 8))))),
        "output_history": draw(st.booleans()),
    }
    if policy in ("fixed_count", "time_schedule"):
        options["unmasking_order"] = draw(st.sampled_from(ORDERS))
    if policy == "time_schedule" or (policy in ("fixed_count", "confidence_threshold") and draw(st.booleans())):
        options["denoising_steps"] = draw(st.integers(1, 6))
    options["confidence_top_k"] = draw(st.sampled_from((None, None, 2, 20)))
    options["relay_start"] = draw(st.sampled_from((None, "self"))) if options["use_relay"] else None
    caches = (False, True, "prefix") if options["sub_block_size"] else (False,)
    options["use_sub_block_cache"] = draw(st.sampled_from(caches))
    if not is_canvas:
        options["fuse_commits"] = draw(st.booleans())
    copies = 1
    if draw(st.booleans()):
        copies = draw(st.sampled_from((1, 1, 2, 3)))
        options |= draw(warpers())
    return name, prompts, draw(st.sampled_from(("left", "right", "mixed"))), copies, options


@st.composite
def warpers(draw: st.DrawFn) -> dict[str, Any]:
    """Options of sampling."""
    options: dict[str, Any] = {"do_sample": True, "top_k": draw(st.sampled_from((0, 2, 10)))}
    if draw(st.booleans()):
        options["top_p"] = 0.8
    if draw(st.booleans()):
        options["repetition_penalty"] = 1.5
    if draw(st.booleans()):
        options |= {"t_max": 2.0, "t_min": 0.3}
    else:
        options["temperature"] = draw(st.sampled_from((0.5, 3.0)))
    return options


def rows_of(output: RelayGenerateOutput, inputs: dict[str, Tensor], copies: int) -> list[tuple]:
    """What each row got: its text, its counts and, if asked for, when each token was revealed and how surely."""
    rows, width = [], inputs["input_ids"].shape[1]
    for row, sequence in enumerate(output.sequences):
        is_text = torch.cat([inputs["attention_mask"][row // copies].bool(), torch.ones(len(sequence) - width).bool()])
        assert (sequence[:width][~is_text[:width]] == PAD).all()
        forwards = (output.denoise_forwards[row], output.commit_forwards[row], output.prefill_forwards[row])
        history, confidence = [], []
        if output.history is not None:
            history = output.history.revealed_at[row, is_text].tolist()
            confidence = output.history.confidence[row, is_text].tolist()
        rows.append((sequence[is_text].tolist(), [int(count) for count in forwards], history, confidence))
    return rows


@settings(max_examples=40, phases=(Phase.explicit, Phase.generate))
@given(case=batches(), seed=st.integers(-(2**63), 2**63 - 100))
def test_generate_any_batch_each_row_as_alone(models: dict[str, Any], case: tuple, seed: int) -> None:
    name, prompts, side, copies, options = case
    model, inputs = models[name], padded(prompts, side)
    count = len(prompts) * copies
    seeds = [seed + row for row in range(count)]

    def generate(inputs: dict[str, Tensor], seeds: list[int], copies: int = 1) -> RelayGenerateOutput:
        sampling = {"sampling_seeds": seeds, "num_return_sequences": copies} if "do_sample" in options else {}
        return model.generate(**inputs, **options, **sampling, pad_token_id=PAD, return_dict_in_generate=True)

    together = rows_of(generate(inputs, seeds, copies), inputs, copies)
    for row in range(count):
        one = padded([prompts[row // copies]], "left")
        [(text, forwards, history, confidence)] = rows_of(generate(one, [seeds[row]]), one, 1)
        ours = together[row]
        end = len(text)
        assert ours[0] == text + [PAD] * (len(ours[0]) - end)
        assert ours[1] == forwards
        assert ours[2][:end] == history
        assert ours[3][:end] == pytest.approx(confidence, abs=1e-4)
        assert set(ours[2][end:]) <= {-1}
