"""transformers' serving with one relay model: loaded our way, options checked before a stream begins.

What is overridden with an underscore has no public counterpart; `tests/serving/test_contract.py` fails when it moves.
"""

import asyncio
import functools
import inspect
import json
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import anyio
from fastapi import FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from openai.types import CompletionUsage
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler, _StreamError, split_revision

from ..loading.checkpoint import find_device, read_diffusion_config, read_tokenizer
from ..modeling import RelayForMaskedDiffusion, RelayGenerateOutput
from . import errors
from .access import AccessCheck
from .managers import RelayGenerationState, http_request, result_of, started_stream, whole_output
from .request_checks import DEFAULT_NEW_TOKENS, check_body, fit_length, read_options
from .streams import ReplyStream


def build_app(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    max_batch_size: int = 16,
    max_queue_size: int = 256,
    host: str = "localhost",
    allow_hosts: Sequence[str] = (),
    allow_origins: Sequence[str] = (),
) -> FastAPI:
    """Loads a model and returns the application that answers for it.

    Args:
        model: folder or Hub id, also the name by which clients ask for it.
        device: name of a torch device; "auto" takes an accelerator if the machine has one.
        dtype: dtype of the weights; "auto" is the dtype of the checkpoint.
        compile: decode by static steps, `cache_implementation="static"`, unless a request or the model says otherwise.
        max_batch_size: the most requests that are decoded at a time.
        max_queue_size: the most that wait for that; others are refused.
        host: address that the server listens on.
        allow_hosts: further names under which it may be asked, "*" for any.
        allow_origins: web pages that may ask it, as `https://example.org`, "*" for any.

    Raises:
        OSError: the model or its tokenizer cannot be read.
        ValueError: the model is no relay model, or a device or dtype is unknown.
    """
    find_device(device)  # raises if the machine lacks it
    manager = RelayModelManager(device, dtype, force_model=model)
    state = RelayGenerationState(compile, max_batch_size, max_queue_size)
    others: Any = OtherHandler()
    app = build_server(
        manager,
        RelayChatCompletionHandler(manager, state),
        completion_handler=RelayCompletionHandler(manager, state),
        response_handler=RelayResponseHandler(manager, state),
        transcription_handler=others,
        systemone_handler=others,
        generation_state=state,
    )
    app.middleware("http")(_note_request)
    if allow_origins:
        app.add_middleware(CORSMiddleware, allow_origins=allow_origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(AccessCheck, host=host, allow_hosts=allow_hosts, allow_origins=allow_origins)
    # Else `generate`'s sentence would stay in the server's log, and the client would read "Internal Server Error".
    errors.install(app)
    return app


class RelayModelManager(ModelManager):
    """Holds the one model of the server."""

    def shutdown(self) -> None:
        """Keeps the model, which `/reset` would unload under running requests, and the next one load again."""

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
        # The route `/load_model` may name any model, and any file of this one.
        if model_id_and_revision != self.process_model_name(self.force_model) or gguf_file is not None:
            raise ValueError(f"This server serves `{self.force_model}`: ask for that one.")
        name, revision = split_revision(model_id_and_revision)
        return read_tokenizer(name, read_diffusion_config(name, revision), revision)

    def _load_model(
        self,
        model_id_and_revision: str,
        tqdm_class: type | None = None,
        progress_callback: Callable | None = None,
        gguf_file: str | None = None,
    ) -> RelayForMaskedDiffusion:
        # transformers looks the architecture up among its own attributes, where ours is not; and this way the research
        # fork's checkpoints are read, too.
        name, revision = split_revision(model_id_and_revision)
        return RelayForMaskedDiffusion.from_pretrained(
            name, revision=revision or "main", dtype=self.dtype, device_map=self.device, tqdm_class=tqdm_class
        ).eval()


# How many requests are prepared at once; routes such as `/health` have threads of their own.
PREPARING = anyio.CapacityLimiter(4)


async def _note_request(request: Request, call_next: Callable) -> Response:
    http_request.set(request)
    return await call_next(request)


async def _first_text(stream: ReplyStream) -> Any:
    """Waits for the first item of a stream, which is cancelled if the client goes away before."""
    try:
        return await result_of(asyncio.ensure_future(stream.texts.get()))
    except HTTPException:
        stream.cancel()
        raise


class RelayHandler(BaseHandler):
    """Reads a request's options, relay options among them, and says what is wrong with them."""

    async def handle_request(self, body: dict, request_id: str) -> Response:
        """Answers a request; a stream begins with its first text.

        All that is done before decoding is done on another thread, so that others are answered meanwhile.

        Raises:
            ValueError: a field that cannot be honoured, or an option that `generate` refuses. A stream would send its
                status before `generate` has looked at the options, and the sentence in a form in which clients do not
                show it.
        """
        started_stream.set(None)
        whole_output.set(None)
        # The Responses API streams only if asked to; transformers' handler streams by default.
        body = {"stream": False, **body}
        answer = await anyio.to_thread.run_sync(self._prepare, body, request_id, limiter=PREPARING)
        response = answer()
        if inspect.isawaitable(response):
            response = await response
        if (stream := started_stream.get()) is not None:
            texts, first = stream.texts, await _first_text(stream)
            if isinstance(first, _StreamError):
                raise ValueError(first.msg)
            # Back to where it was; nothing else runs between these lines.
            for text in (first, *[texts.get_nowait() for _ in range(texts.qsize())]):
                texts.put_nowait(text)
        elif (output := whole_output.get()) is not None:
            reply = json.loads(response.body)
            reply["usage"]["forwards"] = forwards_of(output)
            response = JSONResponse(reply)
        return response

    def _prepare(self, body: dict, request_id: str) -> functools.partial:
        """Does what transformers does before decoding: checks, chat template, tokens, options.

        Returns:
            What starts decoding, on the event loop.
        """
        _, model, tokenizer = self._resolve_model(body)
        positions = model.config.positions
        check_body(body, math.inf if positions is None else positions * _longest_token(tokenizer))
        request: Coroutine[Any, Any, Any] = super().handle_request(body, request_id)
        answer = asyncio.run(request)
        inputs, config = answer.keywords["inputs"], answer.keywords["gen_config"]
        fit_length(body, config, inputs["input_ids"].shape[-1], positions)
        return answer

    def _streaming(self, *args: Any, **kwargs: Any) -> functools.partial:
        return _by_name(super()._streaming, args, kwargs)

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> functools.partial:
        return _by_name(super()._non_streaming, args, kwargs)

    def _build_generation_config(
        self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        if body.get("generation_config") is not None:
            options = read_options(body["generation_config"], model_generation_config)
            if "max_length" not in options:
                # As without a `generation_config`, where 20 tokens would be the default.
                options = {"max_new_tokens": DEFAULT_NEW_TOKENS, **options}
            body = {**body, "generation_config": json.dumps(options)}
        seed, biases, temperature, top_p = map(body.get, ("seed", "logit_bias", "temperature", "top_p"))
        if seed is not None and not (type(seed) is int and -(2**63) <= seed < 2**63):
            raise ValueError(f"`seed={seed!r}` is not a whole number of 64 bits: give one, or leave it out.")
        # Neither is left to transformers. It would seed the whole process, other requests included; and it reads biases
        # on one route only, where it refuses whole numbers and an empty set, both of which clients send.
        body = {**body, "seed": None, "logit_bias": None}
        config = super()._build_generation_config(body, model_generation_config, use_cb)
        if biases:
            config.sequence_bias = {(int(token),): float(bias) for token, bias in biases.items()}
        # transformers only sets them, and without `do_sample` they mean nothing.
        if temperature != 0 and (temperature is not None or top_p is not None):
            config.do_sample = True
        # `generate` will take the model's where the request's says nothing.
        samples = model_generation_config.do_sample if config.do_sample is None else config.do_sample
        if seed is not None and samples:
            config.sampling_seeds = [seed]
        return config


def _by_name(function: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> functools.partial:
    """The call, for later, with every argument under its name."""
    return functools.partial(function, **inspect.signature(function).bind(*args, **kwargs).arguments)


@functools.cache
def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The most characters of text that one token can be."""
    return max(map(len, tokenizer.get_vocab()))


def forwards_of(output: RelayGenerateOutput) -> dict[str, int]:
    """The forwards that a reply took, by kind."""
    counts = {"denoise": output.denoise_forwards, "commit": output.commit_forwards, "prefill": output.prefill_forwards}
    return {kind: int(count) for kind, count in counts.items() if count is not None}


class CountingForwards:
    """Adds a reply's forwards to the usage at the end of its stream."""

    def _build_chunk_sse(self, *args: Any, usage: CompletionUsage | None = None, **kwargs: Any) -> str:
        stream = started_stream.get()
        if usage is not None and stream is not None and stream.output is not None:
            usage = CompletionUsage.model_validate({**usage.model_dump(), "forwards": forwards_of(stream.output)})
        return super()._build_chunk_sse(*args, usage=usage, **kwargs)


class RelayChatCompletionHandler(CountingForwards, RelayHandler, ChatCompletionHandler):
    """`/v1/chat/completions`."""


class RelayCompletionHandler(CountingForwards, RelayHandler, CompletionHandler):
    """`/v1/completions`."""


class RelayResponseHandler(RelayHandler, ResponseHandler):
    """`/v1/responses`."""


class OtherHandler:
    """Routes of transformers' serving that need another kind of model."""

    async def handle_request(self, *args: Any) -> None:
        """Refuses."""
        raise HTTPException(status_code=404, detail="This server generates text: use `/v1/chat/completions`.")
