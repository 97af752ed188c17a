"""Between transformers' handlers, which ask for one reply each, and the `Batcher`, which decodes many."""

import asyncio
import contextlib
import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from fastapi import HTTPException
from fastapi import Request as HttpRequest
from transformers import GenerationConfig
from transformers.cli.serving.utils import GenerateManager, GenerationState

from ..modeling.outputs_relay import RelayGenerateOutput
from .batching import Batcher, QueueFullError, Request, shared_options
from .streams import ReplyStream

# The request in work, the stream that it has started, and the output of `generate` if it has not started one.
http_request: ContextVar[HttpRequest] = ContextVar("http_request")
started_stream: ContextVar[ReplyStream | None] = ContextVar("started_stream", default=None)
whole_output: ContextVar[RelayGenerateOutput | None] = ContextVar("whole_output", default=None)


async def result_of(getting: asyncio.Future) -> Any:
    """Waits for a result, unless the client goes away before.

    Raises:
        HTTPException: it did.
    """
    while not (await asyncio.wait({getting}, timeout=0.2))[0]:
        if await http_request.get().is_disconnected():
            getting.cancel()
            raise HTTPException(status_code=499, detail="The client went away.")  # for the log
    return getting.result()


class RelayGenerateManager(GenerateManager):
    """Decodes all requests on one thread, by a `Batcher`.

    Args:
        batcher: decodes them side by side.
    """

    def __init__(self, batcher: Batcher) -> None:
        super().__init__()
        self.batcher = batcher

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, Any]:
        """Starts a stream, and notes it.

        Raises:
            HTTPException: too many requests are waiting.
        """
        stream = ReplyStream(processor, asyncio.get_running_loop(), asyncio.Queue(), response_parser)

        def finish(result: RelayGenerateOutput | Exception) -> None:
            if isinstance(result, Exception):
                stream.fail(result)
            else:
                stream.finish(result)

        def is_cancelled() -> bool:
            return stream.is_cancelled

        self._add(finish, is_cancelled, model, inputs, gen_config, tokenizer=processor, streamer=stream)
        started_stream.set(stream)
        return stream.texts, stream

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, Any]:
        """Waits for a whole reply, which leaves the batch if the client goes away.

        Raises:
            HTTPException: too many requests are waiting, or the client has gone.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future = loop.create_future()

        def resolve(result: RelayGenerateOutput | Exception) -> None:
            if future.done():  # nobody waits for it any more
                return
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        def finish(result: RelayGenerateOutput | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(resolve, result)

        self._add(finish, future.done, model, inputs, gen_config, tokenizer=processor)
        try:
            output = await result_of(future)
        finally:
            future.cancel()
        whole_output.set(output)
        length = inputs["input_ids"].shape[-1]
        tokens = output.sequences[0, length:]
        return processor.decode(tokens, skip_special_tokens=True), length, tokens

    def _add(
        self,
        finish: Callable[[RelayGenerateOutput | Exception], None],
        is_cancelled: Callable[[], bool],
        model: Any,
        inputs: Any,
        options: GenerationConfig,
        **arguments: Any,
    ) -> None:
        prepare = functools.partial(model.block_decoder, **inputs, generation_config=options, **arguments)
        try:
            self.batcher.add(Request(prepare, shared_options(options), finish, is_cancelled))
        except QueueFullError as error:
            raise HTTPException(status_code=503, detail=str(error)) from error
        self.submit(self._decode)

    def _decode(self) -> None:
        """Decodes until nothing is left; what was queued meanwhile finds its work done."""
        while self.batcher.turn():
            pass


class RelayGenerationState(GenerationState):
    """One queue for all requests; transformers' continuous batching, which goes token by token, is off.

    Args:
        compile: decode by static steps, one request at a time.
        max_batch_size: the most requests that are decoded at a time.
        max_queue_size: the most that wait for that.
    """

    def __init__(self, compile: bool = False, max_batch_size: int = 16, max_queue_size: int = 256) -> None:
        super().__init__(compile=compile, continuous_batching=False)
        self._manager = RelayGenerateManager(Batcher(max_batch_size, max_queue_size))

    def get_manager(self, model_id: str, use_cb: bool = False) -> RelayGenerateManager:
        """The same for every model id, because there is one model."""
        return self._manager
