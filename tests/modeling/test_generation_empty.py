"""Options that are given, but empty: they mean "none", or are refused in so many words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .decoding import prompt_of

EMPTY = [
    {"stop_strings": []},
    {"stop_strings": ""},
    {"eos_token_id": []},
    {"bad_words_ids": []},
    {"sequence_bias": {}},
    {"sequence_bias": []},
    {"suppress_tokens": []},
    {"begin_suppress_tokens": []},
]


@pytest.mark.parametrize("option", EMPTY, ids=str)
def test_empty_option_means_none(make_model: Callable, tokenizer: Any, option: dict[str, Any]) -> None:
    model, prompt = make_model(text={"vocab_size": 259}, mask_token_id=258), prompt_of(13)
    expected = model.generate(prompt, max_new_tokens=20)
    assert torch.equal(model.generate(prompt, max_new_tokens=20, tokenizer=tokenizer, **option), expected)
    # An empty one replaces the model's own.
    if "eos_token_id" in option:
        model.generation_config.eos_token_id = int(expected[0, 20])
        assert model.generate(prompt, max_new_tokens=20).shape[1] < 33
        assert torch.equal(model.generate(prompt, max_new_tokens=20, **option), expected)


@pytest.mark.parametrize("texts", [[""], ["", "zz"]])
def test_empty_text_among_stop_strings_is_refused(make_model: Callable, tokenizer: Any, texts: list[str]) -> None:
    model = make_model(text={"vocab_size": 259}, mask_token_id=258)
    with pytest.raises(ValueError, match="holds an empty text, which every text contains: leave it out"):
        model.generate(prompt_of(13), max_new_tokens=20, tokenizer=tokenizer, stop_strings=texts)
