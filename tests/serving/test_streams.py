"""Replies on their way to readers: slow ones, gone ones and failing ones, beside others that get theirs."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from fastapi import HTTPException
from transformers import GenerationConfig
from transformers.cli.serving.utils import DirectStreamer, _StreamError

from relay_hf import RelayForMaskedDiffusion
from relay_hf.serving.batching import Batcher
from relay_hf.serving.managers import RelayGenerateManager, http_request
from relay_hf.testing import all_tokens_but, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
SECONDS = 60  # used up only if something is broken


class Client:
    """The other end of a request, as far as the server asks about it."""

    def __init__(self, is_there: bool = True) -> None:
        self.is_there = is_there

    async def is_disconnected(self) -> bool:
        return not self.is_there


@pytest.fixture(scope="module")
def model() -> RelayForMaskedDiffusion:
    text = {"max_position_embeddings": 8192}
    model = tiny_model(TOKENIZER, open_channel=True, token_shift=True, text=text).double()
    model.generation_config.suppress_tokens = all_tokens_but(TOKENIZER, "abcdef")
    return model


@pytest.fixture
def manager() -> RelayGenerateManager:
    return RelayGenerateManager(Batcher(4, 4))


def request(model: RelayForMaskedDiffusion, text: str, new_tokens: int) -> tuple[Any, ...]:
    """What handlers give to a manager."""
    options = GenerationConfig(**{**model.generation_config.to_dict(), "max_new_tokens": new_tokens})
    return model, TOKENIZER, TOKENIZER(text, return_tensors="pt"), options, "id"


def reply(model: RelayForMaskedDiffusion, text: str, new_tokens: int) -> str:
    _, _, inputs, options, _ = request(model, text, new_tokens)
    tokens = model.generate(**inputs, generation_config=options)[0, inputs["input_ids"].shape[1] :]
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


async def read(texts: asyncio.Queue) -> list[Any]:
    """All of a stream but its end."""
    items = []
    while (item := await texts.get()) is not None:
        items.append(item)
        if isinstance(item, _StreamError):
            break
    return items


def run(work: Coroutine) -> Any:
    return asyncio.run(asyncio.wait_for(work, SECONDS))


def test_stream_that_nobody_reads_holds_up_nobody(
    model: RelayForMaskedDiffusion, manager: RelayGenerateManager
) -> None:
    async def serve() -> tuple[str, str]:
        unread, _ = manager.generate_streaming(*request(model, "abc", 40))
        texts, _ = manager.generate_streaming(*request(model, "fed", 60))
        return "".join(await read(texts)), "".join(await read(unread))

    assert run(serve()) == (reply(model, "fed", 60), reply(model, "abc", 40))


def test_stream_that_fails_ends_alone(
    model: RelayForMaskedDiffusion, manager: RelayGenerateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = DirectStreamer.put

    def fail(self: DirectStreamer, value: Any) -> None:
        if self.total_tokens >= 5 and self is first.streamer:
            raise OverflowError("no such character")
        put(self, value)

    monkeypatch.setattr(DirectStreamer, "put", fail)
    first: Any = None

    async def serve() -> tuple[list[Any], list[Any]]:
        nonlocal first
        broken, first = manager.generate_streaming(*request(model, "abc", 40))
        texts, _ = manager.generate_streaming(*request(model, "fed", 60))
        return await read(texts), await read(broken)

    whole, broken = run(serve())
    assert "".join(whole) == reply(model, "fed", 60)
    assert broken[-1].msg == "no such character"
    assert reply(model, "abc", 40).startswith("".join(broken[:-1]))
    assert manager.batcher.running == 0


def test_cancelled_stream_leaves_the_batch(model: RelayForMaskedDiffusion, manager: RelayGenerateManager) -> None:
    async def serve() -> str:
        texts, stream = manager.generate_streaming(*request(model, "abc", 5000))
        await texts.get()
        stream.cancel()
        other, _ = manager.generate_streaming(*request(model, "fed", 60))
        return "".join(await read(other))

    assert run(serve()) == reply(model, "fed", 60)
    manager.submit(lambda: None).result(SECONDS)  # the thread is free, long before 5000 tokens
    assert (manager.batcher.running, manager.batcher.waiting) == (0, 0)


def test_whole_reply_that_nobody_waits_for_leaves_the_batch(
    model: RelayForMaskedDiffusion, manager: RelayGenerateManager
) -> None:
    http_request.set(Client(is_there=False))

    async def serve() -> None:
        await manager.generate_non_streaming(*request(model, "abc", 5000))

    with pytest.raises(HTTPException) as raised:
        run(serve())
    assert raised.value.status_code == 499
    manager.submit(lambda: None).result(SECONDS)
    assert manager.batcher.running == 0


def test_whole_replies_at_once_equal_each_alone(model: RelayForMaskedDiffusion, manager: RelayGenerateManager) -> None:
    http_request.set(Client())
    cases = [("abc", 20), ("fed", 45), ("abcabcabcabc", 9)]

    async def serve() -> list[Any]:
        return await asyncio.gather(*[manager.generate_non_streaming(*request(model, *case)) for case in cases])

    results = run(serve())
    assert [text for text, _, _ in results] == [reply(model, *case) for case in cases]
    assert [(length, len(tokens)) for _, length, tokens in results] == [(3, 20), (3, 45), (12, 9)]


def test_request_beyond_the_queue_is_refused(model: RelayForMaskedDiffusion) -> None:
    manager = RelayGenerateManager(Batcher(1, 1))
    manager.batcher.max_queue_size = -1

    async def serve() -> None:
        manager.generate_streaming(*request(model, "abc", 8))

    with pytest.raises(HTTPException, match="0 requests are waiting, as many as may: ask again later") as raised:
        run(serve())
    assert raised.value.status_code == 503
