"""The server for OpenAI clients, as users start it: with the model's name, the plug-in found by its entry point."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

# Before what imports it.
pytest.importorskip("vllm", reason="vLLM is not installed: `make test-vllm` makes an environment that has it.")

import openai

from relay_hf.testing import CHAT_TEMPLATE, all_tokens_but, byte_tokenizer

from .engines import SURE, Engine, Request, make_checkpoint, random_prompts
from .server import serve

STOP = 256  # [EOS]
# A CPU would otherwise take what memory it has, and bf16.
SMALL = ("--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    folder, tokenizer = tmp_path_factory.mktemp("served"), byte_tokenizer(chat_template=CHAT_TEMPLATE)
    # It writes letters, because vLLM keeps back bytes that are no text yet.
    suppressed = sorted({*all_tokens_but(tokenizer, "abcdefghijklmnop")} - {STOP})
    defaults = {"eos_token_id": STOP, "suppress_tokens": suppressed, **SURE}
    return make_checkpoint(folder, tokenizer=tokenizer, token_shift=True, generation=defaults), tokenizer, folder


@pytest.fixture(scope="module")
def client(model: tuple[Any, Any, Path]) -> Iterator[openai.OpenAI]:
    with serve(model[2], *SMALL) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def expected(
    model: tuple[Any, Any, Path], prompt: list[int], new: int, stops: tuple[int, ...] = (STOP,), **options: Any
) -> str:
    answer = Engine.generate(model[0], Request(prompt, new, options, stops))
    return model[1].decode(answer.tokens, skip_special_tokens=True)


def test_eight_clients_at_once_get_what_generate_writes(client: openai.OpenAI, model: tuple[Any, Any, Path]) -> None:
    prompts = random_prompts(*range(3, 27, 3))
    name = client.models.list().data[0].id

    def ask(prompt: list[int]) -> Any:
        return client.completions.create(model=name, prompt=prompt, max_tokens=29)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, prompts))
    texts = [answer.choices[0].text for answer in answers]
    assert texts == [expected(model, prompt, 29) for prompt in prompts]
    assert texts != [expected(model, prompt, 29, use_relay=False) for prompt in prompts]
    # Forwards, denoise and commit, in the response.
    forwards = answers[0].metrics["speculative_decoding"]["num_spec_steps"]
    assert forwards == Engine.generate(model[0], Request(prompts[0], 29, {}, stops=(STOP,))).forwards


def test_chat_streams_by_block_with_options_of_the_request(client: openai.OpenAI, model: tuple[Any, Any, Path]) -> None:
    options = {"unmasking_policy": "fixed_count", "unmasking_threshold": 2, "do_sample": True, "sampling_seeds": [3]}
    messages: Any = [{"role": "user", "content": "hello"}]
    stream = client.chat.completions.create(
        model=str(model[2]),
        messages=messages,
        max_tokens=30,
        stream=True,
        extra_body={"vllm_xargs": options, "ignore_eos": True},
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    prompt = model[1].apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert "".join(pieces) == expected(model, prompt["input_ids"], 30, stops=(), **options)
    assert 4 <= len([piece for piece in pieces if piece]) <= 5  # blocks, not tokens


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"extra_body": {"vllm_xargs": {"unmasking_treshold": 0.5}}}, "a relay model takes"),
        ({"temperature": 0}, "temperature"),
        ({"seed": 1}, "seed"),
        ({"top_p": 0.5}, "put it into `vllm_xargs`"),
    ],
    ids=["misspelt", "temperature", "seed", "top_p"],
)
def test_refused_request_gets_a_sentence_and_the_server_goes_on(
    client: openai.OpenAI, model: tuple[Any, Any, Path], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=sentence):
        client.completions.create(model=str(model[2]), prompt=[5, 6, 7], max_tokens=8, **options)
    answer = client.completions.create(model=str(model[2]), prompt=[5, 6, 7], max_tokens=8)
    assert answer.choices[0].text == expected(model, [5, 6, 7], 8)


@pytest.mark.slow
def test_two_processes_of_tensor_parallelism(model: tuple[Any, Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    prompts = random_prompts(*range(3, 27, 3))
    with serve(model[2], *SMALL, "--tensor-parallel-size", "2") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(
                lambda prompt: client.completions.create(model=str(model[2]), prompt=prompt, max_tokens=30), prompts
            )
            texts = [answer.choices[0].text for answer in answers]
    assert texts == [expected(model, prompt, 30) for prompt in prompts]
    assert texts != [expected(model, prompt, 30, use_relay=False) for prompt in prompts]
