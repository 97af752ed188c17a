"""Checks of a request before any work, and its options for `generate`."""

import inspect
import json
import math
from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..modeling.generation_options_relay import option_names

# What transformers' serving allows a request that does not say how long its reply may be.
DEFAULT_NEW_TOKENS = 1024
# Options of `generate` about the form of its result, which is a reply here.
RESULT_OPTIONS = {"num_return_sequences", "return_dict_in_generate", *option_names("result")}
LENGTH_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
# Fields that we cannot honour, with the values that ask for nothing; beside them, `null` never does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "background": (False,),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False, 0),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "previous_response_id": (),
    "prompt_cache_key": (),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "web_search_options": (),
}
TEXT_PARTS = ("text", "input_text", "output_text")
# What a request may hand to a chat template are variables, not how it is applied.
OF_TEMPLATING = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {
    "self",
    "kwargs",
    "documents",
}


def check_body(body: dict[str, Any], most_characters: float) -> None:
    """Raise if a field of the request cannot be honoured, or the request is absurdly large.

    Args:
        body: the request.
        most_characters: the most text that fits into the model's positions.

    Raises:
        ValueError: a field is not supported, or the request is too long.
    """
    characters = 0
    for value in _values(body):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"The request holds the number {value}, which JSON does not have: give a finite one.")
        characters += len(value) if isinstance(value, str) else 0
    if characters > most_characters:
        raise ValueError(
            f"The request holds {characters} characters, but the model's positions end before {most_characters:.0f}: "
            "shorten it."
        )
    for name, neutral in NEUTRAL.items():
        if (value := body.get(name)) is not None and not any(
            value == n and type(value) in (type(n), float) for n in neutral
        ):
            raise ValueError(f"`{name}={_short(value)}` is not supported: leave it out.")
    if not isinstance(body.get("stream", False), bool | None):
        raise ValueError(f"`stream={_short(body['stream'])}` must be true or false.")
    if unfit := sorted((body.get("chat_template_kwargs") or {}).keys() & OF_TEMPLATING):
        raise ValueError(
            f"`chat_template_kwargs` holds {unfit}, but the server applies the model's own chat template: leave them "
            "out."
        )
    for part in _parts(body):
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS:
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"A message holds a part of type {_short(kind)}, but the model reads text: leave it out.")


def fit_length(body: dict[str, Any], config: GenerationConfig, prompt: int, positions: int | None) -> None:
    """Raise if prompt and reply exceed the model's positions; a reply without a length gets those that are left.

    Args:
        body: the request.
        config: its options; changed in place.
        prompt: its number of tokens.
        positions: the model's number of positions, or None for any number.

    Raises:
        ValueError: prompt and reply are too long, or there is no room for a reply.
    """
    if positions is None:
        return
    new = config.max_new_tokens
    if new is None:
        new = config.max_length - prompt if config.max_length is not None else DEFAULT_NEW_TOKENS
    if not _asks_for_length(body):
        new = config.max_new_tokens = max(min(new, positions - prompt), 1)
    if prompt + new > positions:
        raise ValueError(
            f"The prompt takes {prompt} positions and the reply {new}, but the model has {positions}: shorten the "
            "prompt, or lower `max_tokens`."
        )


def read_options(given: Any, model_generation_config: GenerationConfig) -> dict[str, Any]:
    """The request's `generation_config`, JSON or an object, as a dictionary of options that `generate` knows.

    Raises:
        ValueError: it cannot be read, or holds an option that `generate` or a reply does not have.
    """
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
    if any(isinstance(value, float) and not math.isfinite(value) for value in _values(options)):
        raise ValueError("`generation_config` holds a number that JSON does not have: give finite ones.")
    return options


def _asks_for_length(body: dict[str, Any]) -> bool:
    options = body.get("generation_config")
    options = json.loads(options) if isinstance(options, str) else options or {}
    return any(body.get(name) is not None for name in LENGTH_FIELDS) or bool(
        {"max_new_tokens", "max_length"} & {*options}
    )


def _parts(body: dict[str, Any]) -> Iterator[Any]:
    """The parts of messages that are no plain text."""
    given = body.get("messages", body.get("input"))
    for message in given if isinstance(given, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            yield from content
        elif isinstance(message, dict) and content is None and "image" in str(message.get("type")):
            yield message  # the Responses API takes parts without a message around them


def _values(given: Any) -> Iterator[Any]:
    """Every value inside, however deep."""
    waiting = [given]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
        else:
            yield value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
