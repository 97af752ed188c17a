"""What ours overrides in transformers' serving is still there, takes the same arguments, and is still what it calls."""

import inspect
import re
from collections.abc import Callable

import pytest
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import (
    BaseHandler,
    DirectStreamer,
    GenerateManager,
    GenerationState,
    Modality,
    _StreamError,
)

from relay_hf.serving import managers, server

OVERRIDDEN = [
    (
        ModelManager,
        server.RelayModelManager,
        ["shutdown", "_load_model", "_load_processor"],
    ),
    (GenerateManager, managers.RelayGenerateManager, ["generate_streaming", "generate_non_streaming"]),
    (GenerationState, managers.RelayGenerationState, ["get_manager"]),
    (BaseHandler, server.RelayHandler, ["_build_generation_config"]),
    (ChatCompletionHandler, server.CountingForwards, ["_build_chunk_sse"]),
    (CompletionHandler, server.CountingForwards, ["_build_chunk_sse"]),
    *(
        (handler, server.RelayHandler, ["handle_request", "_streaming", "_non_streaming"])
        for handler in (ChatCompletionHandler, CompletionHandler, ResponseHandler)
    ),
]
CASES = [(theirs, ours, name) for theirs, ours, names in OVERRIDDEN for name in names]


@pytest.mark.parametrize(("theirs", "ours", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_overridden_method_takes_the_arguments_of_transformers(theirs: type, ours: type, name: str) -> None:
    """A method that transformers renames is missing here; one that it stops calling fails in `test_server.py`."""
    their_names = [n for n in inspect.signature(getattr(theirs, name)).parameters if n != "self"]
    our_parameters = inspect.signature(vars(ours)[name]).parameters
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in our_parameters.values())
    assert takes_all or [n for n in our_parameters if n != "self"] == their_names


@pytest.mark.parametrize(
    ("theirs", "name"),
    [(ModelManager, "_load_model"), (ModelManager, "_load_processor"), (BaseHandler, "_build_generation_config")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_private_method_is_called_by_transformers(theirs: type, name: str) -> None:
    callers = inspect.getsource(theirs) + inspect.getsource(ChatCompletionHandler)
    assert f"self.{name}(" in callers


@pytest.mark.parametrize("handler", [ChatCompletionHandler, CompletionHandler, ResponseHandler])
def test_handlers_prepare_everything_before_they_decode(handler: type) -> None:
    """What is prepared on a thread of its own must not wait for anything, and ends with one of these calls."""
    source = inspect.getsource(handler.handle_request)
    assert source.count("await ") == source.count("return await self._non_streaming(") == 1
    assert source.count("return self._streaming(") == 1
    for name in ("_streaming", "_non_streaming"):
        assert {"inputs", "gen_config"} <= inspect.signature(getattr(handler, name)).parameters.keys()


def test_streamer_takes_what_ours_gives_it() -> None:
    names = inspect.signature(DirectStreamer).parameters
    assert [*names] == ["tokenizer", "loop", "queue", "response_parser"]
    assert {"put", "end"} <= vars(DirectStreamer).keys()


@pytest.mark.parametrize("handler", [ChatCompletionHandler, CompletionHandler, ResponseHandler])
def test_handlers_read_of_a_stream_what_ours_has(handler: type) -> None:
    read = set(re.findall(r"streamer\.(\w+)", inspect.getsource(handler)))
    assert read == {"total_tokens", "cancel"}


@pytest.mark.parametrize("handler", [ChatCompletionHandler, CompletionHandler])
def test_streams_end_with_their_usage(handler: type) -> None:
    source = inspect.getsource(handler._streaming)
    assert re.findall(r"_build_chunk_sse\([^)]*usage=usage", source)


def test_pinned_server_lists_its_model_alone() -> None:
    assert "self.force_model is not None" in inspect.getsource(ModelManager.list_models)


def test_streams_report_failures_as_items_of_their_queue() -> None:
    assert _StreamError("why").msg == "why"
    assert "_StreamError(str(e))" in inspect.getsource(GenerateManager.generate_streaming)


def test_application_takes_our_handlers() -> None:
    wanted = {"transcription_handler", "systemone_handler", "completion_handler", "response_handler"}
    assert wanted <= inspect.signature(build_server).parameters.keys()


def test_transformers_server_does_not_batch_continuously(make_model: Callable) -> None:
    model = make_model()
    assert not GenerationState(continuous_batching=True).use_continuous_batching(model, Modality.LLM)
    with pytest.raises(AttributeError, match="init_continuous_batching"):
        model.init_continuous_batching()
