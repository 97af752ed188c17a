"""`generate` on the device gives the CPU's tokens and forwards, over its options, for one row and for batches."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria

from relay_hf import RelayCache, RelayForMaskedDiffusion, RelayGenerateOutput
from relay_hf.testing import tiny_model

from ..conftest import MASK

EVEN = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
RAGGED = torch.tensor([[0, 0, 0, 0, 1, 2, 3], [0, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7]])
# Prompts and their masks: one row, rows of the same blocks, rows of other lengths.
INPUTS: dict[str, dict[str, Tensor]] = {
    "one": {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 6]])},
    "even": {"input_ids": EVEN},
    "ragged": {"input_ids": RAGGED, "attention_mask": (RAGGED > 0).long()},
}
SEEDS = {"do_sample": True, "sampling_seeds": "one a row"}
SUB_BLOCKS = {"sub_block_size": 2, "use_sub_block_cache": True}


class Sevens(StoppingCriteria):
    """Ends a row whose last token seven divides, on the device of the tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] % 7 == 0


class Never(StoppingCriteria):
    """Answers on the CPU."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "low threshold": {"unmasking_threshold": 0.1},
    "one a step": {"unmasking_threshold": 1.0},
    "confidence budget": {"unmasking_policy": "confidence_budget", "unmasking_threshold": 0.5},
    "fixed count": {"unmasking_policy": "fixed_count", "unmasking_threshold": 2},
    "time schedule": {"unmasking_policy": "time_schedule", "denoising_steps": 3, "unmasking_threshold": 0.5},
    "entropy": {"unmasking_policy": "entropy_bound", "unmasking_threshold": 0.5},
    "sub-blocks": {"sub_block_size": 2},
    "sub-block cache": SUB_BLOCKS,
    "prefix cache": {**SUB_BLOCKS, "use_sub_block_cache": "prefix"},
    "fused commits": {"fuse_commits": True},
    "both": {**SUB_BLOCKS, "fuse_commits": True},
    "no relay": {"use_relay": False},
    "sample": SEEDS,
    "warpers": {
        **SEEDS, "temperature": 0.7, "top_k": 10, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "epsilon_cutoff": 1e-4,
        "eta_cutoff": 1e-4, "repetition_penalty": 1.2,
    },
    "temperatures": {**SEEDS, "t_max": 1.0, "t_min": 0.2},
    "renormalize": {**SEEDS, "renormalize_logits": True, "remove_invalid_values": True},
    "processors": {"suppress_tokens": [3, 4], "bad_words_ids": [[5]], "sequence_bias": [[[6], 3.0]]},
    "confidence_top_k": {"confidence_top_k": 3},
    "stop tokens": {"eos_token_id": [7, 14, 21, 28], "pad_token_id": 0},
    "criteria": {"stopping_criteria": [Sevens()]},
    "criteria on the CPU": {"stopping_criteria": [Never()], "max_time": 1000.0},
    "history": {"output_history": True},
    "self": {"relay_start": "self"},
    "self, fused": {"relay_start": "self", "fuse_commits": True},
    "self, sub-block cache": {"relay_start": "self", **SUB_BLOCKS},
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "shift": {"token_shift": True},
    "no shift": {"token_shift": False},
    "soft_mask": {"token_shift": True, "relay_channel": "soft_mask"},
    "residual_context": {"token_shift": False, "relay_channel": "residual_context"},
    "canvas": {"block_size": None},
}
# The options that concern a channel, or a canvas; the first two models go through all.
OF_CHANNELS = ("greedy", "sub-block cache", "fused commits", "self", "history")
OF_CANVASES = ("greedy", "sample", "history", "one a step")
CASES = [
    (model, name)
    for model in MODELS
    for name in {"canvas": OF_CANVASES, "shift": OPTIONS, "no shift": OPTIONS}.get(model, OF_CHANNELS)
]


def build(name: str = "shift") -> RelayForMaskedDiffusion:
    return tiny_model(open_channel=True, **{"block_size": 4, **MODELS[name]})


def run(model: RelayForMaskedDiffusion, device: Any, inputs: dict[str, Tensor], **options: Any) -> RelayGenerateOutput:
    """`generate` of eleven tokens, from prompts that are moved to a device."""
    rows = len(inputs["input_ids"])
    if options.get("sampling_seeds"):
        options["sampling_seeds"] = list(range(rows))
    options = {"max_new_tokens": 11, "unmasking_threshold": 0.3, "eos_token_id": None, "pad_token_id": 0, **options}
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    return model.to(device).generate(**moved, return_dict_in_generate=True, **options)


def on_cpu(output: RelayGenerateOutput) -> list[Tensor | None]:
    """Everything but the cache."""
    names = ("sequences", "denoise_forwards", "commit_forwards", "prefill_forwards", "reference_forwards")
    parts = [getattr(output, name) for name in names]
    parts += [] if output.history is None else [output.history.revealed_at]
    return [None if part is None else part.cpu() for part in parts]


def check(model: RelayForMaskedDiffusion, device: Any, inputs: dict[str, Tensor], **options: Any) -> None:
    """Runs a model on both."""
    expected, output = (run(copy.deepcopy(model), place, inputs, **options) for place in ("cpu", device))
    assert output.sequences.device.type == device.type
    torch.testing.assert_close(on_cpu(output), on_cpu(expected))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(("model", "name"), CASES)
def test_generate_equals_cpu(device: torch.device, model: str, name: str, inputs: str) -> None:
    check(build(model), device, INPUTS[inputs], **OPTIONS[name])


@pytest.mark.parametrize("channel", ["residual_context", "soft_mask"])
def test_generate_reference_start_equals_cpu(device: torch.device, channel: str) -> None:
    reference = tiny_model(seed=5, block_size=4, relay_channel="none")
    model = tiny_model(open_channel=True, block_size=4, relay_channel=channel)
    outputs = [
        run(model, place, INPUTS["ragged"], relay_start="reference", reference_model=copy.deepcopy(reference).to(place))
        for place in ("cpu", device)
    ]
    torch.testing.assert_close(on_cpu(outputs[1]), on_cpu(outputs[0]))


@pytest.mark.parametrize("name", ["greedy", "sub-block cache", "fused commits", "sample", "history"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generate_half_precision_equals_cpu(device: torch.device, dtype: torch.dtype, name: str) -> None:
    check(build().to(dtype), device, INPUTS["ragged"], **OPTIONS[name])


def test_generate_unseeded_sampling_runs(device: torch.device) -> None:
    output = run(build(), device, INPUTS["even"], do_sample=True, num_return_sequences=2)
    assert output.sequences.shape == (4, 16)


def test_generate_canvas_equals_cpu(device: torch.device) -> None:
    canvas = torch.tensor([[1, MASK, MASK, 4, MASK, 6], [MASK, 2, 3, MASK, 5, 6]])
    inputs = {"input_ids": canvas, "attention_mask": torch.ones_like(canvas)}
    check(build("canvas"), device, inputs, max_new_tokens=None, output_history=True)


def test_generate_prompt_on_cpu_gives_tokens_of_model(device: torch.device) -> None:
    model = build()
    expected = run(model, "cpu", INPUTS["one"]).sequences
    output = model.to(device).generate(
        **INPUTS["one"], max_new_tokens=11, unmasking_threshold=0.3, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(output.cpu(), expected)


class Listener:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.drafts: list[list[int]] = []

    def put(self, tokens: Tensor) -> None:
        self.tokens += tokens.flatten().tolist()

    def put_draft(self, tokens: Tensor) -> None:
        self.drafts.append(tokens.flatten().tolist())

    def end(self) -> None:
        pass


def test_generate_streams_what_the_cpu_streams(device: torch.device) -> None:
    listeners = []
    for place in ("cpu", device):
        listeners.append(Listener())
        run(build(), place, INPUTS["one"], streamer=listeners[-1])
    assert listeners[0].drafts
    assert vars(listeners[0]) == vars(listeners[1])


def test_generate_turns_of_a_chat_equal_cpu(device: torch.device) -> None:
    texts = []
    for place in ("cpu", device):
        model = build()
        cache, ids = RelayCache(config=model.config.text_config), INPUTS["one"]["input_ids"]
        for turn in range(3):
            ids = run(model, place, {"input_ids": ids}, past_key_values=cache, max_new_tokens=6).sequences.cpu()
            ids = torch.cat([ids, torch.tensor([[turn + 1, 2]])], 1)
        texts.append(ids)
    assert torch.equal(*texts)
