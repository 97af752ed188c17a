"""Requests that misbehave: answered in OpenAI's form, before any work, while others are served."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fastapi import FastAPI
from starlette.testclient import TestClient

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.modeling.generation_static_relay import StaticDecoder
from relay_hf.serving import access
from relay_hf.serving.batching import Batcher
from relay_hf.serving.server import build_app
from relay_hf.testing import CHAT_TEMPLATE, all_tokens_but, byte_tokenizer

from ..conftest import text_config

TURNS = [{"role": "user", "content": "Who are you?"}]
POSITIONS = 128
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 128 positions that writes halves of an umlaut, among letters."""
    path = tmp_path_factory.mktemp("requests") / "model"
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    text = text_config(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=POSITIONS
    )
    torch.manual_seed(0)
    model = RelayForMaskedDiffusion(
        RelayConfig(text_config=text, block_size=8, mask_token_id=tokenizer.mask_token_id, token_shift=True)
    )
    model.generation_config.suppress_tokens = all_tokens_but(tokenizer, "abcdef ")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def app(folder: Path) -> FastAPI:
    return build_app(str(folder), device="cpu")


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, base_url="http://localhost:8000", raise_server_exceptions=False) as client:
        yield client


def chat(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": TURNS, "max_tokens": 8, **fields})


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def message_of(response: Any, status: int = 400) -> str:
    """What is wrong, in OpenAI's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error["message"]


def test_compile_decodes_by_static_steps(folder: Path, client: TestClient) -> None:
    compiling = build_app(str(folder), device="cpu", compile=True)
    watched = mock.patch.object(StaticDecoder, "finish", autospec=True, side_effect=StaticDecoder.finish)
    with TestClient(compiling, base_url="http://localhost:8000") as other, watched as run:
        assert text_of(chat(other)) == text_of(chat(client))
    assert run.call_count == 1


# -- others are served meanwhile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/responses", "/v1/completions"])
def test_health_answers_while_requests_are_prepared(
    app: FastAPI, client: TestClient, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More requests than there are threads for them, all of which take their time."""
    began, done = threading.Semaphore(0), threading.Event()

    def slow(*_: Any) -> Any:
        began.release()
        assert done.wait(60)
        raise ValueError("slow enough")

    monkeypatch.setattr("relay_hf.serving.server.check_body", slow)
    body = {"messages": TURNS, "input": "x", "prompt": "x"}
    fields = {"/v1/chat/completions": "messages", "/v1/responses": "input", "/v1/completions": "prompt"}[route]
    with ThreadPoolExecutor(60) as pool:
        requests = [pool.submit(client.post, route, json={fields: body[fields]}) for _ in range(60)]
        assert all(began.acquire(timeout=60) for _ in range(4))
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/v1/models").status_code == 200
        done.set()
        assert {message_of(request.result(60)) for request in requests} == {"slow enough"}
    monkeypatch.undo()
    assert text_of(chat(client))


@pytest.mark.parametrize("name", ["chat_template", "max_length", "padding", "tokenize"])
def test_chat_template_of_a_request_is_refused(client: TestClient, name: str) -> None:
    endless = "{% for i in range(1000000000000) %}{% endfor %}"
    message = message_of(chat(client, chat_template_kwargs={name: endless}))
    assert message.startswith(f"`chat_template_kwargs` holds ['{name}'], but the server applies the model's own")
    assert text_of(chat(client, chat_template_kwargs={"enable_thinking": False})) == text_of(chat(client))


def test_text_longer_than_the_model_is_refused_before_work(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RelayForMaskedDiffusion, "generate", lambda *_, **__: pytest.fail("work"))
    template = "user: \nassistant: "
    for length, new in ((POSITIONS - len(template) - 7, 8), (1, POSITIONS), (1, 10**30)):
        turns = [{"role": "user", "content": "a" * length}]
        for stream in (False, True):
            message = message_of(chat(client, messages=turns, max_tokens=new, stream=stream))
            assert message.startswith(f"The prompt takes {length + len(template)} positions and the reply {new}, but")
    # Not even read: no token of this tokenizer stands for more than six characters.
    message = message_of(chat(client, messages=[{"role": "user", "content": "a" * 10**6}]))
    assert "1000004 characters" in message or "characters, but the model's positions end before" in message


def test_reply_of_no_given_length_takes_the_room_that_is_left(client: TestClient) -> None:
    response = client.post("/v1/chat/completions", json={"messages": TURNS})
    assert response.json()["usage"]["total_tokens"] == POSITIONS
    exact = POSITIONS - response.json()["usage"]["prompt_tokens"]
    assert text_of(chat(client, max_tokens=exact)) == text_of(response)


def test_body_of_absurd_size_is_refused_unread(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MOST_BYTES", 1000)
    assert "longer than 1000 bytes" in message_of(chat(client, messages=[{"role": "user", "content": "a" * 1000}]))
    assert text_of(chat(client))


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue_is_told_in_openais_form(client: TestClient, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(Batcher, "waiting", 10**6)
    assert "1000000 requests are waiting, as many as may" in message_of(chat(client, stream=stream), 503)
    monkeypatch.undo()
    assert text_of(chat(client))


ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]


@pytest.mark.parametrize("route", ROUTES)
def test_usage_counts_forwards(client: TestClient, app: FastAPI, folder: Path, route: str) -> None:
    """A text of 20 tokens behind one of 17 takes three blocks, of which two are committed."""
    body = {"messages": TURNS, "input": "Who are you?", "prompt": "user: Who are you?\nassistant: "}
    fields = {"/v1/chat/completions": "messages", "/v1/responses": "input", "/v1/completions": "prompt"}[route]
    length = "max_output_tokens" if route == "/v1/responses" else "max_tokens"
    request = {fields: body[fields], length: 20}
    model, ids = RelayForMaskedDiffusion.from_pretrained(folder).eval(), byte_tokenizer()(body["prompt"]).input_ids
    output = model.generate(torch.tensor([ids]), max_new_tokens=20, return_dict_in_generate=True)
    expected = {
        "denoise": int(output.denoise_forwards),
        "commit": int(output.commit_forwards),
        "prefill": int(output.prefill_forwards),
    }
    assert expected["denoise"] > expected["commit"] > expected["prefill"] == 1
    assert client.post(route, json=request).json()["usage"]["forwards"] == expected
    if route != "/v1/responses":
        lines = client.post(route, json={**request, "stream": True}).text.splitlines()
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert [chunk["usage"]["forwards"] for chunk in chunks if chunk.get("usage")] == [expected]


# -- what is no request ------------------------------------------------------------------------------------------------

NO_REQUESTS = [
    b"",
    b"{",
    b"[]",
    b"3",
    b"null",
    b'"text"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"max_tokens": ' + b"9" * 5000 + b"}",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b"{}",
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body", NO_REQUESTS, ids=lambda body: repr(body[:20]))
def test_malformed_body_is_told_in_openais_form(client: TestClient, route: str, body: bytes) -> None:
    if (route, body) == ("/v1/completions", b"{}"):
        body = b'{"prompt": null}'
    assert message_of(client.post(route, content=body, headers=JSON))


def test_other_content_types_routes_and_methods_are_told_in_openais_form(client: TestClient) -> None:
    body = json.dumps({"messages": TURNS}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert "is not a JSON object" in message_of(
            client.post("/v1/chat/completions", content=body, headers={"content-type": kind})
        )
    assert message_of(client.get("/v1/nothing"), 404)
    assert message_of(client.get("/v1/chat/completions"), 405)
    assert message_of(client.post("/v1/audio/transcriptions"), 404)


BAD_FIELDS: list[tuple[str, str]] = [
    ('"temperature": NaN', "holds the number nan"),
    ('"temperature": Infinity', "holds the number inf"),
    ('"temperature": 1e999', "holds the number inf"),
    ('"temperature": -1', "temperature"),
    ('"temperature": ' + "9" * 400, "OverflowError"),
    ('"temperature": "hot"', "could not convert"),
    ('"top_p": []', "check its fields"),
    ('"max_tokens": -1', "max_new_tokens"),
    ('"max_tokens": 1e300', "The prompt takes"),
    ('"max_tokens": "many"', "invalid literal"),
    ('"messages": "text"', "check its fields"),
    ('"messages": [3]', "check its fields"),
    ('"messages": {"role": "user"}', "check its fields"),
    ('"messages": null', "check its fields"),
    ('"model": 3', "Server is pinned"),
    ('"model": {"a": 1}', "Server is pinned"),
    ('"stream": "yes"', "`stream='yes'` must be true or false"),
    ('"stop": 5', ""),
    ('"stop": [""]', "holds an empty text"),
    ('"logit_bias": [1]', "check its fields"),
    ('"logit_bias": {"1": 1e999}', "holds the number inf"),
    ('"generation_config": {"unmasking_threshold": NaN}', "holds the number nan"),
    ('"generation_config": "{\\"unmasking_threshold\\": NaN}"', "a number that JSON does not have"),
    ('"chat_template_kwargs": [1]', "check its fields"),
    ('"n": 2', "`n=2` is not supported"),
    ('"logprobs": true', "`logprobs=True` is not supported"),
    ('"response_format": {"type": "json_object"}', "is not supported"),
    ('"presence_penalty": 0.5', "`presence_penalty=0.5` is not supported"),
    ('"unheard_of": 1', "Unexpected fields"),
]


@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize(("field", "message"), BAD_FIELDS, ids=[field[:40] for field, _ in BAD_FIELDS])
def test_senseless_field_is_told_in_openais_form(client: TestClient, field: str, message: str, stream: str) -> None:
    fields = {"messages": json.dumps(TURNS), "max_tokens": "8", "stream": stream}
    name, value = field.split(": ", 1)
    fields[name.strip('"')] = value
    body = "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"
    response = client.post("/v1/chat/completions", content=body.encode(), headers=JSON)
    assert message in message_of(response)


def test_fields_that_ask_for_nothing_are_taken(client: TestClient) -> None:
    neutral = {"n": 1, "logprobs": False, "presence_penalty": 0.0, "response_format": {"type": "text"}, "user": "me"}
    assert text_of(chat(client, **neutral)) == text_of(chat(client))
    for stop in ([], "", None):
        assert text_of(chat(client, stop=stop)) == text_of(chat(client))
        response = client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 8, "stop": stop, "echo": False})
        assert response.json()["usage"]["completion_tokens"] == 8


def test_echo_and_parts_that_are_no_text_are_refused(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 8, "echo": True})
    assert message_of(response) == "`echo=True` is not supported: leave it out."
    words, picture = (
        {"type": "text", "text": "Hi"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}},
    )
    told = "A message holds a part of type 'image_url', but the model reads text: leave it out."
    assert message_of(chat(client, messages=[{"role": "user", "content": [words, picture]}])) == told
    assert text_of(chat(client, messages=[{"role": "user", "content": [words]}]))
    part = {"type": "input_image", "image_url": "data:"}
    for given in ([part], [{"role": "user", "content": [part]}]):
        assert "'input_image'" in message_of(client.post("/v1/responses", json={"input": given}))


# -- one model ---------------------------------------------------------------------------------------------------------


def test_no_route_loads_a_second_copy(client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RelayForMaskedDiffusion, "from_pretrained", lambda *_, **__: pytest.fail("a second copy"))
    expected = text_of(chat(client))
    assert client.post("/reset").json() == {"status": "ok"}
    assert text_of(chat(client)) == expected
    assert '"cached": true' in client.post("/load_model", json={"model": str(folder)}).text
    for name in (f"{folder}:weights.gguf", f"{folder}/", f"{folder}@main", "nobody/nothing"):
        assert "ask for that one" in client.post("/load_model", json={"model": name}).text, name
    assert message_of(client.post("/load_model", json={})) == "Missing `model` field in the request body."


def test_models_lists_the_model_alone(client: TestClient, folder: Path) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [str(folder)]


# -- the whole reply ---------------------------------------------------------------------------------------------------


def test_unfinished_character_comes_out_of_a_stream(client: TestClient) -> None:
    """A reply that ends between the two bytes of an umlaut, of which the first is the only token that is possible."""
    tokenizer = byte_tokenizer()
    (first, _) = tokenizer("ä").input_ids
    options = {"suppress_tokens": sorted(set(range(len(tokenizer))) - {first})}
    for count in (1, 3):
        fields = {"prompt": "abc", "max_tokens": count, "generation_config": options}
        whole = client.post("/v1/completions", json=fields).json()["choices"][0]["text"]
        assert "\N{REPLACEMENT CHARACTER}" in whole
        lines = client.post("/v1/completions", json={**fields, "stream": True}).text.splitlines()
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole


# -- who may ask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "192.168.1.7", "LOCALHOST"])
def test_own_names_and_addresses_may_be_asked(client: TestClient, host: str) -> None:
    assert client.get("/health", headers={"host": host}).status_code == 200
    assert client.get("/health", headers={"host": host, "origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "[::1", "", "x@y"]
)
def test_other_hosts_are_refused(client: TestClient, host: str) -> None:
    for path in ("/health", "/v1/models"):
        assert "is not a name of this server: start it with `--allow_hosts`" in message_of(
            client.get(path, headers={"host": host}), 403
        )


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", ""])
def test_other_origins_are_refused(client: TestClient, origin: str) -> None:
    told = "may not ask here: start the server with `--allow_origins`"
    assert told in message_of(client.post("/reset", headers={"origin": origin}), 403)
    asked = {"origin": origin, "access-control-request-method": "POST"}
    assert told in message_of(client.options("/v1/chat/completions", headers=asked), 403)


def test_allowed_hosts_and_origins_may_ask(folder: Path, app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    friendly = build_app(
        str(folder), device="cpu", allow_hosts=["models.example"], allow_origins=["https://chat.example"]
    )
    client = TestClient(friendly, base_url="http://models.example")
    response = client.get("/health", headers={"origin": "https://chat.example"})
    assert response.headers["access-control-allow-origin"] == "https://chat.example"
    assert message_of(client.get("/health", headers={"origin": "https://evil.example"}), 403)
    assert message_of(client.get("/health", headers={"host": "evil.example"}), 403)
