"""What `generate` refuses, in one sentence and before any forward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache, TextStreamer

from relay_hf import RelayCache, RelayForMaskedDiffusion

from ..conftest import MASK


@pytest.fixture
def model(make_model: Callable) -> RelayForMaskedDiffusion:
    """A forward fails the test."""
    model = make_model(token_shift=True)

    def fail(module: Any, arguments: tuple) -> None:
        raise AssertionError("a forward ran before the refusal")

    model.model.register_forward_pre_hook(fail)
    return model


@pytest.fixture
def prompt() -> Tensor:
    return torch.arange(1, 11)[None]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beam search": ({"num_beams": 2}, "asked for beam_search.*`num_beams=1`"),
    "beam sampling": ({"num_beams": 2, "do_sample": True}, "asked for beam_sample"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "asked for assisted_generation.*without an assistant"),
    "offloaded cache": ({"cache_implementation": "offloaded"}, "`cache_implementation='offloaded'` cannot hold"),
    "paged cache": ({"cache_implementation": "paged"}, "Continuous batching decodes left to right"),
    "no cache": ({"use_cache": False}, "`use_cache=False` is not supported"),
    "threshold above one": ({"unmasking_threshold": 1.5}, r"`unmasking_threshold=1.5` is not a probability"),
    "threshold below zero": ({"unmasking_threshold": -0.5}, r"`unmasking_threshold=-0.5` is not a probability"),
    "negative budget": (
        {"unmasking_threshold": -0.5, "unmasking_policy": "confidence_budget"},
        r"`unmasking_threshold=-0.5` is negative",
    ),
    "unknown policy": ({"unmasking_policy": "left_to_right"}, "`unmasking_policy='left_to_right'` is unknown"),
    "sub-block not dividing": ({"sub_block_size": 3}, "`sub_block_size=3` does not divide the model's `block_size=8`"),
    "sub-block larger": ({"sub_block_size": 16}, "`sub_block_size=16` does not divide"),
    "sub-block that is no number": ({"sub_block_size": "4"}, "`sub_block_size='4'` is not a whole number"),
    "sub-block that is a flag": ({"sub_block_size": True}, "`sub_block_size=True` is not a whole number"),
    "part of a position as sub-block": ({"sub_block_size": 4.0}, "`sub_block_size=4.0` is not a whole number"),
    "relay that is no flag": ({"use_relay": "no"}, "`use_relay='no'` must be True or False"),
    "cache that is no flag": ({"use_sub_block_cache": 1}, "`use_sub_block_cache=1` must be True or False"),
    "temperature that is no number": (
        {"t_max": "hot", "t_min": 0.5, "do_sample": True},
        "`t_max='hot'` is not a number",
    ),
    "seed that is no list": (
        {"sampling_seeds": 3, "do_sample": True},
        "`sampling_seeds=3` is not a list of 64-bit integers",
    ),
    "seed that is no number": ({"sampling_seeds": [0.5], "do_sample": True}, r"`sampling_seeds=\[0.5\]` is not a list"),
    "sub-block zero": ({"sub_block_size": 0}, "`sub_block_size=0` does not divide"),
    "unknown option": ({"unmasking_treshold": 0.5}, r"not used by the model: \['unmasking_treshold'\]"),
    "state": ({"relay_state": torch.zeros(1, 10, 16)}, r"`generate` does not take \['relay_state'\]"),
    "labels": ({"labels": torch.ones(1, 10)}, r"`generate` does not take \['labels'\]"),
    "bad word of two tokens": (
        {"bad_words_ids": [[3], [4, 5]]},
        "NoBadWordsLogitsProcessor works on single tokens only",
    ),
    "bias of two tokens": (
        {"sequence_bias": [[[4, 5], 1.0]]},
        "SequenceBiasLogitsProcessor works on single tokens only",
    ),
    "minimum length": ({"min_new_tokens": 2, "eos_token_id": 1}, "MinLengthLogitsProcessor is not supported"),
    "n-grams": ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor is not supported"),
    "nothing new": ({"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
    "history without dict": (
        {"output_history": True},
        "`output_history=True` has nowhere to go: also set `return_dict",
    ),
    "sub-block cache without sub-blocks": (
        {"use_sub_block_cache": True, "sub_block_size": None},
        "`use_sub_block_cache=True` has no sub-blocks to work with: also set `sub_block_size`",
    ),
    "schedule without sampling": ({"t_max": 1.0, "t_min": 0.5}, "`t_max` is about drawing tokens.*`do_sample=True`"),
    "half a schedule": ({"t_max": 1.0, "do_sample": True}, "`t_max` and `t_min` are the two ends of one schedule"),
    "other half of a schedule": ({"t_min": 1.0, "do_sample": True}, "`t_max` and `t_min` are the two ends"),
    "rising schedule": ({"t_max": 0.5, "t_min": 1.0, "do_sample": True}, "`t_max=0.5` and `t_min=1.0` must be"),
    "schedule to zero": ({"t_max": 0.5, "t_min": 0.0, "do_sample": True}, "t_max >= t_min > 0"),
    "two temperatures": (
        {"t_max": 0.5, "t_min": 0.2, "do_sample": True, "temperature": 0.7},
        "`temperature=0.7` and `t_max=0.5` both set the temperature",
    ),
    "seeds without sampling": ({"sampling_seeds": [1]}, "`sampling_seeds` is about drawing tokens"),
    "seeds of other rows": (
        {"sampling_seeds": [1, 2], "do_sample": True},
        "`sampling_seeds` has 2 numbers for 1 rows",
    ),
    "entropy below zero": (
        {"unmasking_policy": "entropy_bound", "unmasking_threshold": -1.0},
        "`unmasking_threshold=-1.0` is negative: `entropy_bound`",
    ),
    "part of a position": ({"unmasking_policy": "fixed_count"}, "`unmasking_threshold=0.85` is not a number of pos"),
    "synced gpus": ({"synced_gpus": True}, "`synced_gpus=True` is not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_generate_refused_option_raises(model: RelayForMaskedDiffusion, prompt: Tensor, case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, **{"max_new_tokens": 4, **options})


def test_generate_assistant_model_raises(model: RelayForMaskedDiffusion, prompt: Tensor) -> None:
    with pytest.raises(ValueError, match="asked for assisted_generation"):
        model.generate(prompt, max_new_tokens=4, assistant_model=model)


def test_generate_static_cache_object_raises(model: RelayForMaskedDiffusion, prompt: Tensor) -> None:
    cache = StaticCache(config=model.config.text_config, max_cache_len=32)
    with pytest.raises(ValueError, match="is a StaticCache, which cannot hold the relay state: pass a `RelayCache`"):
        model.generate(prompt, max_new_tokens=4, cache=cache)


def test_generate_foreign_cache_class_raises(model: RelayForMaskedDiffusion, prompt: Tensor) -> None:
    with pytest.raises(ValueError, match="is a DynamicCache, which cannot hold the relay state"):
        model.generate(prompt, max_new_tokens=4, cache=DynamicCache())


def test_generate_cache_with_prefix_raises(model: RelayForMaskedDiffusion, prompt: Tensor) -> None:
    cache = RelayCache()
    cache.update(torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4), 0)
    with pytest.raises(ValueError, match=r"a prefix of other rows.*or `reset\(\)` the cache"):
        model.generate(prompt, max_new_tokens=4, cache=cache)


def test_generate_mask_token_in_prompt_of_block_model_raises(model: RelayForMaskedDiffusion, prompt: Tensor) -> None:
    prompt[0, 3] = MASK
    with pytest.raises(ValueError, match=r"prompt holds \[MASK\] tokens.*`block_size=None`"):
        model.generate(prompt, max_new_tokens=4)


def test_generate_mask_token_in_padding_accepted(make_model: Callable) -> None:
    ids, mask = torch.tensor([[MASK, 3, 4]]), torch.tensor([[0, 1, 1]])
    assert make_model().generate(ids, attention_mask=mask, max_new_tokens=4).shape == (1, 7)


def test_generate_row_of_padding_only_raises(model: RelayForMaskedDiffusion, prompt: Tensor) -> None:
    mask = torch.stack([torch.ones(10), torch.zeros(10)])
    with pytest.raises(ValueError, match="A prompt is empty"):
        model.generate(prompt.expand(2, -1), attention_mask=mask, max_new_tokens=4)


def test_generate_empty_canvas_raises(make_model: Callable, prompt: Tensor) -> None:
    with pytest.raises(ValueError, match=r"canvas has no \[MASK\] to fill in.*`max_new_tokens`"):
        make_model(block_size=None).generate(prompt)


def test_generate_fused_commits_of_canvas_raises(make_model: Callable, prompt: Tensor) -> None:
    with pytest.raises(ValueError, match="`fuse_commits=True` has no blocks to commit"):
        make_model(block_size=None).generate(prompt, max_new_tokens=3, fuse_commits=True)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.tensor([[5, 64]])}, "hold the token id 64, but the model has 64 tokens: tokenize with"),
        ({"input_ids": torch.tensor([[5, 6], [-1, 7]])}, "hold the token id -1, but the model has 64 tokens"),
        ({"inputs": torch.tensor([5, 6])}, r"have shape \(2,\): pass \(rows, positions\), `input_ids\[None\]`"),
        ({"inputs": [[5, 6]]}, "`input_ids` are a list: pass a tensor of shape"),
        ({"input_ids": torch.tensor([[5]]), "attention_mask": [[1]]}, "`attention_mask` are a list: pass a tensor"),
    ],
    ids=["above", "below", "one dimension", "list", "list as mask"],
)
def test_generate_prompt_that_is_no_batch_of_tokens_raises(
    model: RelayForMaskedDiffusion, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=4)


def test_generate_streamer_with_two_rows_raises(model: RelayForMaskedDiffusion, prompt: Tensor, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="batch size 1"):  # said by the streamer itself
        model.generate(prompt.expand(2, -1), max_new_tokens=4, streamer=TextStreamer(tokenizer))


def test_generate_streamer_that_takes_batches_raises(model: RelayForMaskedDiffusion, prompt: Tensor) -> None:
    class Streamer:
        def put(self, value: Tensor) -> None: ...

        def end(self) -> None: ...

    with pytest.raises(ValueError, match="A streamer shows one row, but the batch has 2"):
        model.generate(prompt.expand(2, -1), max_new_tokens=4, streamer=Streamer())


def test_generate_batch_raises(model: RelayForMaskedDiffusion) -> None:
    with pytest.raises(ValueError, match=r"Continuous batching decodes left to right.*call `generate`"):
        model.generate_batch([[1, 2, 3]])


def test_generate_checkpointing_in_training_writes_what_evaluation_writes(make_model: Callable, prompt: Tensor) -> None:
    """There transformers empties the cache at every layer, but only if gradients are wanted."""
    model = make_model(open_channel=True)
    expected = model.generate(prompt, max_new_tokens=8)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.train().generate(prompt, max_new_tokens=8), expected)
