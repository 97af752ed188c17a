"""`generate` that does not come to its end leaves the cache of a conversation as if it had not been called."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from relay_hf import RelayCache, RelayForMaskedDiffusion

from .decoding import prompts_of
from .interruptions import Alarm, AlarmingStreamer, Clock, InterruptionError, assert_same_contents, contents

TURN, NEXT, OTHER = prompts_of((19, 5, 21))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"fuse_commits": True},
    {"sub_block_size": 4, "use_sub_block_cache": True, "do_sample": True, "sampling_seeds": [3]},
]


def generate(model: RelayForMaskedDiffusion, cache: RelayCache | None, text: Tensor, **options: Any) -> Tensor:
    settings = {"max_new_tokens": 20, "unmasking_threshold": 0.3, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(text[None], cache=cache, **settings)


def interruptions(model: RelayForMaskedDiffusion) -> Iterator[tuple[str, Callable[[Alarm], dict[str, Any]]]]:
    """Where an alarm may go off, each as options of `generate`; hooks are the caller's to remove."""

    def hooked(module: torch.nn.Module) -> Callable[[Alarm], dict[str, Any]]:
        return lambda alarm: module.register_forward_hook(alarm) and {}

    def reader(alarm: Alarm) -> Callable[..., Tensor]:
        return lambda ids, scores, **_: alarm() or torch.zeros(len(ids), dtype=torch.bool)

    yield "before the last layer", hooked(model.model.layers[0])
    yield "behind the last layer", hooked(model.model)
    yield "behind the model", hooked(model)
    yield "streamer", lambda alarm: {"streamer": AlarmingStreamer(alarm)}
    yield "criterion", lambda alarm: {"stopping_criteria": [reader(alarm)]}
    yield "processor", lambda alarm: {"logits_processor": [lambda ids, scores: alarm() or scores]}


@pytest.mark.parametrize(
    ("options", "text"), zip(OPTIONS, [torch.cat([TURN, NEXT]), OTHER, OTHER], strict=True), ids=str
)
def test_interrupted_at_any_moment_leaves_the_cache_as_it_was(
    make_model: Callable, options: dict[str, Any], text: Tensor
) -> None:
    model, options = make_model(open_channel=True, token_shift=True), {**options, "max_new_tokens": 12}
    expected = generate(model, None, text, **options)
    cache = RelayCache(config=model.config.text_config)
    generate(model, cache, TURN, **options)
    before = {n: v.clone() if isinstance(v, Tensor) else v for n, v in contents(cache).items()}
    for place, arm in interruptions(model):
        count = 0
        while True:
            alarm = Alarm(count, KeyboardInterrupt if count % 2 else InterruptionError)
            hooks = [dict(module._forward_hooks) for module in model.modules()]
            try:
                generate(model, cache, text, **options, **arm(alarm))
            except (KeyboardInterrupt, InterruptionError):
                assert_same_contents(cache, before)
            else:
                break
            finally:
                for module, kept in zip(model.modules(), hooks, strict=True):
                    module._forward_hooks.clear()
                    module._forward_hooks.update(kept)
            count = 2 * count + 1
        assert count > 2, place
        # The call that came to its end gave the text, from what all the others had left.
        assert torch.equal(generate(model, cache, text, **options), expected), place
        cache = RelayCache(config=model.config.text_config)
        generate(model, cache, TURN, **options)


def test_interrupted_batch_leaves_an_empty_cache_empty(make_model: Callable) -> None:
    model = make_model(open_channel=True, token_shift=True)
    cache, ids = RelayCache(config=model.config.text_config), torch.stack([TURN, TURN.flip(0)])
    expected = model.generate(ids, max_new_tokens=20)
    handle = model.model.register_forward_hook(Alarm(6, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, cache=cache, max_new_tokens=20)
    handle.remove()
    assert cache.get_seq_length() == 0
    assert cache.tokens is None
    assert torch.equal(model.generate(ids, cache=cache, max_new_tokens=20), expected)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
@pytest.mark.parametrize("looks", range(3))
def test_max_time_leaves_a_prefix_that_the_next_turn_goes_on_from(
    make_model: Callable, looks: int, options: dict[str, Any]
) -> None:
    model = make_model(open_channel=True, token_shift=True)
    cache = RelayCache(config=model.config.text_config)
    whole = generate(model, None, TURN, **options)[0]
    reply = generate(model, cache, TURN, stopping_criteria=[Clock(looks)], **options)[0]
    assert (len(reply) < len(whole)) == (looks < 2)
    assert torch.equal(reply, whole[: len(reply)])
    assert torch.equal(cache.tokens[0], whole[: cache.get_seq_length()])
    text = torch.cat([reply, NEXT])
    assert torch.equal(generate(model, cache, text, **options), generate(model, None, text, **options))
