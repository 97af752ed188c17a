"""transformers' serving with one relay model: loaded our way, options checked before a stream begins.

What is overridden with an underscore has no public counterpart; `tests/test_serving_contract.py` fails when it moves.
"""

import asyncio
import json
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler, GenerateManager, GenerationState, _StreamError
from transformers.utils import logging

from ..checkpoint_loading import find_device, read_diffusion_config, read_tokenizer
from ..modeling import RelayForMaskedDiffusion

logger = logging.get_logger(__name__)

# What transformers' serving allows a request that does not say how long its reply may be.
DEFAULT_NEW_TOKENS = 1024
# Options of `generate` about the form of its result, which is a reply here.
RESULT_OPTIONS = {"num_return_sequences", "output_history", "return_dict_in_generate"}


def build_app(model: str, *, device: str = "auto", dtype: str = "auto") -> FastAPI:
    """Loads a model and returns the application that answers for it.

    Args:
        model: folder or Hub id, also the name by which clients ask for it.
        device: where the model runs; "auto" takes an accelerator if there is one.
        dtype: of the weights; "auto" is that of the checkpoint.

    Raises:
        OSError: the model or its tokenizer cannot be read.
        ValueError: it is no relay model, or there is no such device or dtype.
    """
    find_device(device)  # refuses one that is not there
    manager, state = RelayModelManager(model, device, dtype), RelayGenerationState()
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
    # Else `generate`'s sentence would stay in the server's log, and the client would read "Internal Server Error". The
    # others are what transformers raises for fields of a wrong type, and for lack of `messages`.
    for kind in (ValueError, TypeError, AttributeError, LookupError, HTTPException):
        app.add_exception_handler(kind, _tell_client)
    return app


async def _tell_client(request: Request, error: Exception) -> JSONResponse:
    """Answers in OpenAI's form, with status 400 if the error has none."""
    status, message = 400, str(error)
    if isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif not isinstance(error, ValueError):
        # No sentence for users, and perhaps a defect of the server.
        logger.error("A request could not be answered.", exc_info=error)
        message = f"The request could not be answered ({type(error).__name__}: {error}): check its fields."
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=status)


class RelayModelManager(ModelManager):
    """Holds the one model of the server."""

    def __init__(self, model: str, device: str, dtype: str) -> None:
        super().__init__(device=device, dtype=dtype, force_model=model)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Appends `@main` to a name without a revision; a folder may have an @ in its name."""
        return model_id if "@" in model_id and not Path(model_id).is_dir() else f"{model_id}@main"

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The one model that requests may name; transformers lists the Hub's cache, whatever is served."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "relay_hf"}]

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
        if model_id_and_revision != self.process_model_name(self.force_model):  # the route `/load_model`
            raise ValueError(f"This server serves `{self.force_model}`: ask for that one.")
        name, revision = model_id_and_revision.rsplit("@", 1)
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
        name, revision = model_id_and_revision.rsplit("@", 1)
        return RelayForMaskedDiffusion.from_pretrained(
            name, revision=revision, dtype=self.dtype, device_map=self.device, tqdm_class=tqdm_class
        ).eval()


# The request at hand, and what is known of the stream that it has started: where its texts appear, and its streamer.
_request: ContextVar[Request] = ContextVar("_request")
_started_stream: ContextVar[tuple[asyncio.Queue, Any] | None] = ContextVar("_started_stream", default=None)


async def _note_request(request: Request, call_next: Callable) -> Response:
    _request.set(request)
    return await call_next(request)


async def _first_text(texts: asyncio.Queue, streamer: Any) -> Any:
    """Waits for the first item of a stream, which is cancelled if the client goes away before."""
    getting = asyncio.ensure_future(texts.get())
    while not (await asyncio.wait({getting}, timeout=0.2))[0]:
        if await _request.get().is_disconnected():
            getting.cancel()
            streamer.cancel()
            raise HTTPException(status_code=499, detail="The client went away.")  # nobody reads it
    return getting.result()


class RelayGenerateManager(GenerateManager):
    """Decodes one request after the other, on one thread."""

    def generate_streaming(self, *args: Any, **kwargs: Any) -> tuple[asyncio.Queue, Any]:
        """Starts a stream, and notes where its texts will appear."""
        texts, streamer = super().generate_streaming(*args, **kwargs)
        _started_stream.set((texts, streamer))
        return texts, streamer


class RelayGenerationState(GenerationState):
    """One queue for all requests; continuous batching, which goes token by token, is off."""

    def __init__(self) -> None:
        super().__init__(continuous_batching=False)
        self._manager = RelayGenerateManager()

    def get_manager(self, model_id: str, use_cb: bool = False) -> RelayGenerateManager:
        """The same for every model id, because there is one model."""
        return self._manager


class RelayHandler(BaseHandler):
    """Reads a request's options, relay options among them, and says what is wrong with them."""

    async def handle_request(self, body: dict, request_id: str) -> Response:
        """Answers a request; a stream begins with its first text.

        Raises:
            ValueError: an option that `generate` refuses. A stream would send its status before `generate` has looked
                at the options, and the sentence in a form in which clients do not show it.
        """
        _started_stream.set(None)
        # The Responses API streams only if asked to; transformers' handler would do it unless told not to.
        response = await super().handle_request({"stream": False, **body}, request_id)
        if (stream := _started_stream.get()) is not None:
            texts, first = stream[0], await _first_text(*stream)
            if isinstance(first, _StreamError):
                raise ValueError(first.msg)
            # Back to where it was; nothing else runs between these lines.
            for text in (first, *[texts.get_nowait() for _ in range(texts.qsize())]):
                texts.put_nowait(text)
        return response

    def _build_generation_config(
        self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        if body.get("generation_config") is not None:
            options = _read_options(body["generation_config"], model_generation_config)
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


def _read_options(given: Any, model_generation_config: GenerationConfig) -> dict[str, Any]:
    """The request's `generation_config`, JSON or an object, as a dictionary of options that `generate` knows."""
    try:
        options = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise ValueError(f"`generation_config={given!r}` is not JSON ({error}): give an object in JSON.") from error
    if not isinstance(options, dict):
        raise ValueError(f"`generation_config={given!r}` is not a JSON object: give options of `generate` by name.")
    known = {name for name in (vars(GenerationConfig()) | vars(model_generation_config)) if not name.startswith("_")}
    if unknown := sorted(options.keys() - known):
        raise ValueError(
            f"`generation_config` holds {unknown}, which `generate` does not know: check the spelling, for instance "
            "of `unmasking_threshold`."
        )
    if unfit := sorted(options.keys() & RESULT_OPTIONS):
        raise ValueError(f"`generation_config` holds {unfit}, but a reply is one text: leave them out.")
    return options


class RelayChatCompletionHandler(RelayHandler, ChatCompletionHandler):
    """`/v1/chat/completions`."""


class RelayCompletionHandler(RelayHandler, CompletionHandler):
    """`/v1/completions`."""


class RelayResponseHandler(RelayHandler, ResponseHandler):
    """`/v1/responses`."""


class OtherHandler:
    """Routes of transformers' serving that need another kind of model."""

    async def handle_request(self, *args: Any) -> None:
        """Refuses."""
        raise HTTPException(status_code=404, detail="This server generates text: use `/v1/chat/completions`.")
