"""What a request may ask for, and whence its defaults come."""

from collections.abc import Callable
from typing import Any

import pytest

# Before what imports it.
pytest.importorskip("vllm", reason="vLLM is not installed: `make test-vllm` makes an environment that has it.")

from vllm.exceptions import VLLMValidationError

from .engines import SURE, Engine, Request, assert_same, random_prompts

REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"unmasking_treshold": 0.5}, {}, r"`extra_args` name \['unmasking_treshold'\]: a relay model takes"),
    ({"unmasking_threshold": 2.0}, {}, "`unmasking_threshold=2.0` is not a probability"),
    ({"sub_block_size": 3}, {}, "`sub_block_size=3` does not divide"),
    ({"max_new_tokens": 3}, {}, r"`extra_args` name \['max_new_tokens'\]"),
    ({"fuse_commits": True}, {}, "`fuse_commits=True` is not supported, because vLLM commits"),
    ({"use_sub_block_cache": True}, {}, "`use_sub_block_cache=True` is not supported"),
    ({"relay_start": "self"}, {}, "`relay_start='self'` is not supported"),
    ({"sampling_seeds": [1, 2], "do_sample": True}, {}, "has 2 numbers for one request"),
    ({"sampling_seeds": [1]}, {}, "`sampling_seeds` is about drawing tokens, but decoding is greedy"),
    ({}, {"top_p": 0.5}, "`top_p=0.5` is not supported for relay models: put it into `vllm_xargs`"),
    ({}, {"logprobs": 1}, "`logprobs=1` is not supported"),
    ({}, {"repetition_penalty": 1.2}, "`repetition_penalty=1.2` is not supported"),
    # vLLM's own word, for all models that denoise.
    ({}, {"temperature": 0.0}, "temperature"),
    ({}, {"seed": 3}, "seed"),
]


@pytest.mark.parametrize(("extra", "params", "sentence"), REFUSED, ids=lambda value: str(value)[:30])
def test_refused_request_says_why_and_harms_nobody(
    engine: Callable, extra: dict[str, Any], params: dict[str, Any], sentence: str
) -> None:
    served: Engine = engine({"token_shift": True})
    (prompt,) = random_prompts(9)
    with pytest.raises(VLLMValidationError, match=sentence):
        served.serve([Request(prompt, 8, extra)], **params)
    assert served.llm.llm_engine.get_num_unfinished_requests() == 0


def test_switches_and_seeds_as_the_server_makes_them_of_json(engine: Callable) -> None:
    """It turns booleans into 0 and 1."""
    served: Engine = engine({"token_shift": True})
    (prompt,) = random_prompts(9)
    drawn = {"do_sample": True, "unmasking_threshold": 0.3, "sampling_seeds": [5], "use_relay": False}
    (expected,) = served.expect([Request(prompt, 20, drawn)])
    (answer,) = served.serve([Request(prompt, 20, {**drawn, "do_sample": 1, "sampling_seeds": 5, "use_relay": 0})])
    assert answer.tokens == expected.tokens


def test_defaults_are_those_of_the_checkpoint(engine: Callable, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Among them the drawing of tokens, which vLLM would put into the parameters of a request and refuse there."""
    defaults = {"unmasking_policy": "fixed_count", "unmasking_threshold": 2, "do_sample": True, "temperature": 0.7,
                "top_k": 9, "top_p": 0.9, "eos_token_id": 2}  # fmt: skip
    served: Engine = engine({"token_shift": True, "generation": defaults})
    requests = [Request(p, 20, {"sampling_seeds": [i]}, stops=(2,)) for i, p in enumerate(random_prompts(6, 9, 14))]
    answers = assert_same(served, requests, stop_token_ids=[])
    assert [a.forwards for a in answers] == [a.forwards for a in served.expect(requests)]


def test_stop_texts_and_chat(engine: Callable, tokenizer: Any) -> None:
    """Stop strings end a text where they begin; vLLM looks for them when a block is given out."""
    served: Engine = engine({"tokenizer": tokenizer, "token_shift": True})
    prompt = tokenizer("one two three")["input_ids"]
    (free,) = served.expect([Request(prompt, 40, SURE, stops=())])
    text = tokenizer.decode(free.tokens)
    stop = text[9:12]
    params = served.params(Request(prompt, 40, SURE, stops=()), stop=[stop], detokenize=True, ignore_eos=True)
    (output,) = served.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert output.outputs[0].text == text[: text.index(stop)]
    assert output.outputs[0].stop_reason == stop
