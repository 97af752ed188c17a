"""`relay-hf serve` as its users meet it: started in a process of its own, driven by the official `openai` client."""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from openai import APITimeoutError, BadRequestError, OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.cli import main
from relay_hf.serving.server import RelayCompletionHandler, RelayGenerationState
from relay_hf.testing import CHAT_TEMPLATE, all_tokens_but, byte_tokenizer

from ..conftest import text_config

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "abc"},
    {"role": "user", "content": "And now?"},
]
# Seconds; none of these waits is ever used up unless something is broken.
START, ANSWER, STOP = 120, 60, 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that says letters and spaces, with keys and values large enough to show in a process's memory."""
    path = tmp_path_factory.mktemp("serving") / "model"
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    text = text_config(
        vocab_size=len(tokenizer), hidden_size=64, num_key_value_heads=4, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    config = RelayConfig(text_config=text, block_size=8, mask_token_id=tokenizer.mask_token_id, token_shift=True)
    model = RelayForMaskedDiffusion(config)
    torch.nn.init.normal_(model.relay.norm.weight, std=0.7)
    model.generation_config.suppress_tokens = all_tokens_but(tokenizer, "abcdefghijklmnop ")
    model.generation_config.unmasking_threshold = 0.4
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process and its address; at the end it must stop in order when interrupted."""
    log = folder.parent / "log.txt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [Path(sys.executable).with_name("relay-hf"), "serve", folder, "--port", "0", "--device", "cpu"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + START
        while "Application startup complete" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process, re.search(r"http://\S+/v1", log.read_text()).group()
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP) == 0, log.read_text()
        assert "Traceback" not in log.read_text().split("Shutting down")[1]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(STOP)


@pytest.fixture(scope="module")
def client(server: tuple[subprocess.Popen, str]) -> OpenAI:
    return OpenAI(base_url=server[1], api_key="none", timeout=ANSWER, max_retries=0)


@pytest.fixture(scope="module")
def generate(folder: Path) -> Any:
    """What the model says in this process."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def run(prompt: list[dict[str, str]] | str, **options: Any) -> str:
        if isinstance(prompt, str):
            inputs = tokenizer(prompt, return_tensors="pt")
        else:
            inputs = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        sequence = model.generate(**inputs, **{"max_new_tokens": 20, **options})[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(sequence, skip_special_tokens=True)

    return run


def ask(client: OpenAI, folder: Path, turns: list[dict[str, str]] = TURNS, **options: Any) -> Any:
    return client.chat.completions.create(
        model=str(folder), messages=turns, **{"max_tokens": 20, **options}, stream=False
    ).choices[0]


def pieces(client: OpenAI, folder: Path, turns: list[dict[str, str]] = TURNS, **options: Any) -> list[str]:
    chunks = client.chat.completions.create(
        model=str(folder), messages=turns, **{"max_tokens": 20, **options}, stream=True
    )
    return [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]


# -- texts ------------------------------------------------------------------------------------------------------------


def test_chat_of_several_turns_equals_generate(client: OpenAI, folder: Path, generate: Any) -> None:
    reply = client.chat.completions.create(model=str(folder), messages=TURNS, max_tokens=20)
    text = reply.choices[0].message.content
    assert text == generate(TURNS)
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (20, "length")
    longer = [*TURNS, {"role": "assistant", "content": text}, {"role": "user", "content": "More."}]
    assert ask(client, folder, longer).message.content == generate(longer) != text


def test_stream_equals_generate(client: OpenAI, folder: Path, generate: Any) -> None:
    streamed = pieces(client, folder)
    assert "".join(streamed) == generate(TURNS)
    assert len(streamed) == 20


def test_two_streams_at_once_equal_each_alone(client: OpenAI, folder: Path, generate: Any) -> None:
    chats = [TURNS, TURNS[:2]]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(pieces, client, folder, turns, max_tokens=100) for turns in chats]
        texts = ["".join(stream.result(ANSWER)) for stream in streams]
    assert texts == [generate(turns, max_new_tokens=100) for turns in chats]


@pytest.fixture(scope="module")
def long_reply_seconds(client: OpenAI, folder: Path) -> float:
    began = time.monotonic()
    ask(client, folder, max_tokens=1400)
    return time.monotonic() - began


def test_abandoned_stream_leaves_the_server_free(
    client: OpenAI, folder: Path, generate: Any, long_reply_seconds: float
) -> None:
    stream = client.chat.completions.create(model=str(folder), messages=TURNS, max_tokens=1400, stream=True)
    next(iter(stream))
    stream.close()
    began = time.monotonic()
    assert ask(client, folder).message.content == generate(TURNS)
    assert time.monotonic() - began < long_reply_seconds / 2


def test_stream_abandoned_while_it_waits_is_not_decoded(
    client: OpenAI, folder: Path, generate: Any, long_reply_seconds: float
) -> None:
    fields = {"model": str(folder), "messages": TURNS, "max_tokens": 1400, "stream": True}
    running = client.chat.completions.create(**fields)
    next(iter(running))
    for _ in range(3):
        with contextlib.suppress(APITimeoutError):
            client.with_options(timeout=0.3).chat.completions.create(**fields).close()
    for _ in running:
        pass
    began = time.monotonic()
    assert ask(client, folder).message.content == generate(TURNS)
    assert time.monotonic() - began < long_reply_seconds


def test_answer_is_not_held_back_by_the_network(client: OpenAI) -> None:
    """With Nagle's algorithm the body would wait for the client to acknowledge the headers, 40 ms later."""
    seconds = []
    for _ in range(21):
        began = time.monotonic()
        client.models.list()
        seconds.append(time.monotonic() - began)
    assert statistics.median(seconds) < 0.03


def test_client_learns_the_model_name_or_leaves_it_out(client: OpenAI, folder: Path, generate: Any) -> None:
    assert [model.id for model in client.models.list()] == [str(folder)]
    unnamed = client.chat.completions.create(model=None, messages=TURNS, max_tokens=20)
    assert unnamed.choices[0].message.content == generate(TURNS)
    with pytest.raises(BadRequestError, match="Server is pinned"):
        client.chat.completions.create(model="other", messages=TURNS)


def test_legacy_completions_equal_generate(client: OpenAI, folder: Path, generate: Any) -> None:
    fields = {"model": str(folder), "prompt": "Once upon", "max_tokens": 20}
    text = generate("Once upon")
    assert client.completions.create(**fields).choices[0].text == text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**fields, stream=True)) == text


def test_responses_equal_generate(client: OpenAI, folder: Path, generate: Any) -> None:
    fields = {"model": str(folder), "input": "Once upon", "max_output_tokens": 20}
    text = generate([{"role": "user", "content": "Once upon"}])
    assert client.responses.create(**fields).output_text == text
    events = client.responses.create(**fields, stream=True)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text


# -- options ----------------------------------------------------------------------------------------------------------

RELAY_OPTIONS = [
    {"unmasking_threshold": 0.0},
    {"unmasking_policy": "confidence_budget", "unmasking_threshold": 1.5, "sub_block_size": 2},
    {"use_relay": False},
]


@pytest.mark.parametrize("options", RELAY_OPTIONS, ids=str)
def test_relay_options_of_a_request_equal_generate(
    client: OpenAI, folder: Path, generate: Any, options: dict[str, Any]
) -> None:
    """As JSON, which is transformers' way, and as an object; for this request only."""
    text = generate(TURNS, **options)
    assert text != generate(TURNS)
    assert ask(client, folder, extra_body={"generation_config": json.dumps(options)}).message.content == text
    assert "".join(pieces(client, folder, extra_body={"generation_config": options})) == text
    assert ask(client, folder).message.content == generate(TURNS)


def test_options_keep_the_default_length(client: OpenAI, folder: Path) -> None:
    for options in ({}, {"extra_body": {"generation_config": {"unmasking_threshold": 0.1}}}):
        reply = client.chat.completions.create(model=str(folder), messages=TURNS, **options)
        assert reply.usage.completion_tokens == 1024


def test_stop_string_ends_both_kinds_of_reply(client: OpenAI, folder: Path, generate: Any) -> None:
    stop = generate(TURNS)[6:8]
    expected = generate(TURNS)[: generate(TURNS).index(stop) + 2]
    reply = ask(client, folder, stop=[stop])
    assert (reply.message.content, reply.finish_reason) == (expected, "stop")
    assert "".join(pieces(client, folder, stop=[stop])) == expected


def test_stop_token_ends_both_kinds_of_reply(client: OpenAI, folder: Path, generate: Any) -> None:
    options = {"eos_token_id": AutoTokenizer.from_pretrained(folder)(generate(TURNS)[9]).input_ids[0]}
    expected = generate(TURNS, **options)
    assert len(expected) < 20
    reply = ask(client, folder, extra_body={"generation_config": options})
    assert (reply.message.content, reply.finish_reason) == (expected, "stop")
    assert "".join(pieces(client, folder, extra_body={"generation_config": options})) == expected


def test_temperature_samples_and_seed_repeats(client: OpenAI, folder: Path, generate: Any) -> None:
    texts = [ask(client, folder, temperature=1.5, seed=seed).message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert ask(client, folder, top_p=0.99, seed=1).message.content != generate(TURNS)
    assert ask(client, folder, temperature=0).message.content == generate(TURNS)


def test_seeded_reply_repeats_whatever_else_is_waiting(client: OpenAI, folder: Path, generate: Any) -> None:
    sampling = {"do_sample": True, "temperature": 1.5}
    alone = [generate(TURNS, **sampling, sampling_seeds=[seed]) for seed in (1, -2)]
    assert alone[0] != alone[1] != generate(TURNS)
    requests = [{"seed": 1}, {}, {"seed": 3}, {"seed": -2}, {}, {"seed": 1}]
    with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
        replies = [pool.submit(ask, client, folder, temperature=1.5, **fields) for fields in requests]
        texts = [reply.result(ANSWER).message.content for reply in replies]
    assert [texts[0], texts[3], texts[5]] == [alone[0], alone[1], alone[0]]
    assert len(set(texts)) == 5
    assert "".join(pieces(client, folder, temperature=1.5, seed=1)) == alone[0]
    assert ask(client, folder, extra_body={"generation_config": sampling}, seed=1).message.content == alone[0]
    # Without drawing there is nothing to seed.
    assert ask(client, folder, seed=1).message.content == generate(TURNS)


def test_seed_counts_where_only_the_model_says_that_it_samples() -> None:
    handler, defaults = RelayCompletionHandler(None, RelayGenerationState()), GenerationConfig(do_sample=True)
    for options in ({}, {"generation_config": {"top_k": 5}}):
        assert handler._build_generation_config({"seed": 7, **options}, defaults).sampling_seeds == [7]
        greedy = handler._build_generation_config({"seed": 7, "temperature": 0, **options}, defaults)
        assert not hasattr(greedy, "sampling_seeds")


def test_frequency_penalty_is_a_repetition_penalty(client: OpenAI, folder: Path, generate: Any) -> None:
    text = generate(TURNS, repetition_penalty=1.5)
    assert ask(client, folder, frequency_penalty=0.5).message.content == text != generate(TURNS)
    reply = client.completions.create(model=str(folder), prompt="Once upon", max_tokens=20, frequency_penalty=0.5)
    assert reply.choices[0].text == generate("Once upon", repetition_penalty=1.5) != generate("Once upon")


def test_logit_bias_is_a_bias_of_single_tokens(client: OpenAI, folder: Path, generate: Any) -> None:
    letter = generate(TURNS)[0]
    (token,) = AutoTokenizer.from_pretrained(folder)(letter).input_ids
    text = generate(TURNS, sequence_bias=[[[token], -100.0]])
    assert letter not in text
    assert ask(client, folder, logit_bias={str(token): -100}).message.content == text
    assert "".join(pieces(client, folder, logit_bias={str(token): -100})) == text
    assert ask(client, folder, logit_bias={}).message.content == generate(TURNS)
    letter = generate("Once upon")[0]
    (token,) = AutoTokenizer.from_pretrained(folder)(letter).input_ids
    reply = client.completions.create(
        model=str(folder), prompt="Once upon", max_tokens=20, logit_bias={str(token): -100}
    )
    assert reply.choices[0].text == generate("Once upon", sequence_bias=[[[token], -100.0]]) != generate("Once upon")


BAD_REQUESTS = [
    ({"generation_config": '{"unmasking_threshold": 7}'}, "`unmasking_threshold=7` is not a probability"),
    ({"generation_config": '{"unmasking_treshold": 0.7}'}, r"\['unmasking_treshold'\], which `generate` does not know"),
    ({"generation_config": '{"sub_block_size": 3}'}, "does not divide the model's `block_size=8`"),
    ({"generation_config": '{"num_beams": 2}'}, "block diffusion reveals tokens out of order"),
    ({"generation_config": '{"output_history": true}'}, "a reply is one text"),
    ({"generation_config": "{oops"}, "is not JSON"),
    ({"generation_config": "[1]"}, "is not a JSON object"),
    ({"generation_config": '{"no_repeat_ngram_size": 2}'}, "NoRepeatNGramLogitsProcessor is not supported"),
    ({"generation_config": '{"sequence_bias": [[[1, 2], 3.0]]}'}, "works on single tokens only"),
    ({"logit_bias": {"12345": 1}}, "the following tokens were being biased"),
    ({"logit_bias": {"1": "much"}}, "could not convert string to float"),
    ({"frequency_penalty": -1}, "`penalty` has to be a strictly positive float"),
    ({"seed": 2**63}, "is not a whole number of 64 bits"),
    ({"seed": "one"}, "`seed='one'` is not a whole number"),
    ({"max_tokens": 0}, "`max_new_tokens` must be greater than 0"),
    ({"max_tokens": [1]}, "check its fields"),
    ({"messages": [{"role": "user", "content": "x[MASK]"}]}, r"The prompt holds \[MASK\]"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_REQUESTS, ids=lambda value: str(value)[:50])
@pytest.mark.parametrize("stream", [False, True])
def test_senseless_request_is_told_and_the_server_goes_on(
    client: OpenAI, folder: Path, generate: Any, fields: dict[str, Any], message: str, stream: bool
) -> None:
    request = {"model": str(folder), "messages": TURNS, "max_tokens": 5, "stream": stream, **fields}
    extra = {name: request.pop(name) for name in ("generation_config",) if name in request}
    with pytest.raises(BadRequestError, match=message):
        client.chat.completions.create(**request, extra_body=extra)
    assert ask(client, folder, max_tokens=5).message.content == generate(TURNS, max_new_tokens=5)


def test_routes_for_other_models_are_refused(client: OpenAI, folder: Path) -> None:
    for path in ("/systemone", "/audio/transcriptions"):
        response = client._client.post(f"{client.base_url}{path.lstrip('/')}", json={"model": str(folder)})
        assert response.status_code == 404
    root = str(client.base_url).removesuffix("v1/")
    assert "ask for that one" in client._client.post(f"{root}load_model", json={"model": "nobody/nothing"}).text


def test_model_comes_back_after_a_reset(client: OpenAI, folder: Path, generate: Any) -> None:
    response = client._client.post(str(client.base_url).removesuffix("v1/") + "reset", json={})
    assert response.status_code == 200
    assert ask(client, folder).message.content == generate(TURNS)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_over_requests(server: tuple[subprocess.Popen, str], client: OpenAI, folder: Path) -> None:
    """Less than 25 kB a request, over 200 of them, every second streamed; it was 2 kB when this was written.

    The cache of such a request holds 640 kB: 625 positions, 2 layers, keys and values of 64 numbers each. One kept per
    request would be 128 MB; one kept every 25 requests is caught.
    """
    memory = psutil.Process(server[0].pid).memory_info
    turns = [{"role": "user", "content": "abcdefgh " * 66}]

    def rounds(count: int) -> int:
        for _ in range(count):
            ask(client, folder, turns, max_tokens=8)
            pieces(client, folder, turns, max_tokens=8)
        return memory().rss

    before = rounds(15)
    assert rounds(100) - before < 200 * 25_000


# -- what is told before anything starts ------------------------------------------------------------------------------


def test_serve_unusable_model_is_one_sentence_and_exit_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bare, plain = tmp_path / "bare", tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(bare)
    plain.mkdir()
    text_config().save_pretrained(plain)
    for path, message in (
        (tmp_path / "none", "is not a model"),
        (tmp_path, "is not a model"),
        (plain, "is not a masked diffusion model"),
        (bare, "has no tokenizer that can be loaded"),
    ):
        assert main(["serve", str(path), "--port", "0"]) == 2
        (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("relay-hf: error: ")]
        assert message in sentence


def test_serve_device_that_is_not_there_is_told_before_the_model_is_loaded(capsys: pytest.CaptureFixture) -> None:
    assert main(["serve", "no-such-model", "--port", "0", "--device", "mps:0"]) == 2
    assert "`device=mps:0` is not available here" in capsys.readouterr().err


def test_serve_taken_port_is_told_before_the_model_is_loaded(
    server: tuple[subprocess.Popen, str], capsys: pytest.CaptureFixture
) -> None:
    port = server[1].split(":")[2].split("/")[0]
    assert main(["serve", "no-such-model", "--port", port]) == 2
    assert f"`localhost:{port}` cannot be listened on" in capsys.readouterr().err
    assert main(["serve", "no-such-model", "--port", "70000"]) == 2
    assert "must be between 0 and 65535" in capsys.readouterr().err


def test_serve_without_the_extra_says_how_to_install_it(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert main(["serve", str(folder)]) == 2
    assert capsys.readouterr().err == (
        "relay-hf: error: The server's dependencies are not installed: run `pip install 'relay-hf[serve]'`.\n"
    )
