"""Ends a call of `generate` at a chosen moment, and looks at the cache of the conversation afterwards."""

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import MaxTimeCriteria

from relay_hf import RelayCache, RelayForMaskedDiffusion

Call = Callable[..., Any]
PLACES = ("before the last layer", "behind the last layer", "behind the model", "streamer", "criterion", "processor")


class InterruptionError(Exception):
    """What nothing else raises."""


class Alarm:
    """Goes off at its n-th call, whoever makes it; beyond their number it only counts."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.left, self.error = at, error

    def __call__(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == -1:
            raise self.error("Wake up")


class AlarmingStreamer:
    def __init__(self, alarm: Alarm) -> None:
        self.put = self.put_draft = self.end = alarm


def contents(cache: RelayCache) -> dict[str, Any]:
    layers: Any = cache.layers
    own = {name: value for name, value in vars(cache).items() if name != "layers"}
    of_layers = [(i, name, value) for i, layer in enumerate(layers) for name, value in vars(layer).items()]
    # What lies in memory behind the committed text is of no turn.
    return {**own, **{f"{name} {i}": value for i, name, value in of_layers if name != "memory"}}


def assert_same_contents(cache: RelayCache, before: dict[str, Any]) -> None:
    after = contents(cache)
    assert after.keys() == before.keys()
    for name, value in before.items():
        if isinstance(value, Tensor):
            assert after[name].equal(value), name
        else:
            assert after[name] == value, name


class Clock(MaxTimeCriteria):
    """Runs out when it has been looked at so often."""

    def __init__(self, looks: int) -> None:
        super().__init__(max_time=3600)
        self.looks = looks

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.looks -= 1
        return torch.full((len(input_ids),), self.looks < 0)


def last_turn(model: RelayForMaskedDiffusion, inputs: dict[str, Tensor], cache: RelayCache) -> dict[str, Tensor]:
    """Answers a prompt of one row into `cache`; returns the text with a few tokens more, as the next turn's prompt."""
    ids = inputs["input_ids"][:, inputs["attention_mask"][0].bool()] if "attention_mask" in inputs else None
    ids = inputs["input_ids"] if ids is None else ids
    reply = model.generate(ids, cache=cache, max_new_tokens=9, eos_token_id=None, pad_token_id=0)
    return {"input_ids": torch.cat([reply, ids.new_tensor([[3, 1, 4]])], dim=-1)}


def check_interruption(model: RelayForMaskedDiffusion, generate: Call, cache: RelayCache, rng: random.Random) -> bool:
    """Ends a call at a random moment and makes it once more; returns whether an error ended it.

    Args:
        model: that of the conversation.
        generate: takes a cache and further options, returns the output of `generate`.
        cache: what earlier turns have left.
        rng: chooses place, moment and error.
    """

    def run(cache: RelayCache, **options: Any) -> Any:
        torch.manual_seed(0)
        return generate(cache=cache, **options)

    before = {name: value.clone() if isinstance(value, Tensor) else value for name, value in contents(cache).items()}
    expected = sequences_of(run(copy.deepcopy(cache)))
    alarm = Alarm(rng.randrange(rng.choice((2, 6, 20))), rng.choice((KeyboardInterrupt, InterruptionError)))
    place, hooked = rng.choice(PLACES), copy.deepcopy(cache)
    is_one = len(expected) == 1
    modules = {PLACES[0]: model.model.layers[0], PLACES[1]: model.model, PLACES[2]: model}
    options: dict[str, Any] = {
        "streamer": {"streamer": AlarmingStreamer(alarm)} if is_one else {},
        "criterion": {"stopping_criteria": [lambda ids, *_, **__: alarm() or torch.zeros(len(ids), dtype=torch.bool)]},
        "processor": {"logits_processor": [lambda ids, scores: alarm() or scores]},
    }.get(place, {})
    handle = modules[place].register_forward_hook(alarm) if place in modules else None
    try:
        output = run(hooked, **options)
    except (KeyboardInterrupt, InterruptionError):
        assert_same_contents(hooked, before)
        assert torch.equal(sequences_of(run(hooked)), expected), place
        return True
    finally:
        if handle is not None:
            handle.remove()
    assert torch.equal(sequences_of(output), expected), place
    return False


def check_out_of_time(generate: Call, cache: RelayCache, rng: random.Random) -> None:
    """Lets the time run out at a random moment: the cache holds the beginning of what came back, and goes on."""
    reply = sequences_of(generate(cache=cache, stopping_criteria=[Clock(rng.randrange(4))]))
    if cache.tokens is not None and len(reply) == 1:
        assert torch.equal(cache.tokens, reply[:, : cache.get_seq_length()])


def sequences_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.sequences
