"""The batcher, driven a turn at a time: whoever is decoded beside a request, it gets what `generate` gives it alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from torch import Tensor
from transformers import GenerationConfig

from relay_hf import RelayForMaskedDiffusion
from relay_hf.modeling.generation_blocks_relay import BlockDecoder
from relay_hf.serving.batching import Batcher, QueueFullError, Request, shared_options
from relay_hf.testing import all_tokens_but, byte_tokenizer, tiny_model

from ..modeling.decoding import prompt_of

BLOCK = 8


@pytest.fixture(scope="module")
def model() -> RelayForMaskedDiffusion:
    # In fp32 rounding depends on the batch, and the relay amplifies it until tokens turn over.
    return tiny_model(open_channel=True, token_shift=True, seed=0).double()


class Call:
    """A request, and what has come of it.

    Args:
        model: that answers.
        prompt: its tokens.
        streamer, tokenizer, options: of `generate`.
    """

    def __init__(
        self,
        model: RelayForMaskedDiffusion,
        prompt: Tensor,
        streamer: Any = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        self.model, self.prompt, self.options = model, prompt, {"unmasking_threshold": 0.3, **options}
        self.tokenizer = tokenizer
        self.config = GenerationConfig(**{**model.generation_config.to_dict(), **self.options})
        self.result: Any = None
        self.is_cancelled = False
        arguments = {"generation_config": self.config, "streamer": streamer, "tokenizer": tokenizer}
        prepare = partial(model.block_decoder, prompt, **arguments)
        self.request = Request(prepare, shared_options(self.config), self.finish, lambda: self.is_cancelled)

    def finish(self, result: Any) -> None:
        assert self.result is None
        self.result = result

    def assert_as_alone(self) -> None:
        options = {"generation_config": self.config, "tokenizer": self.tokenizer, "return_dict_in_generate": True}
        alone = self.model.generate(self.prompt, **options)
        assert not isinstance(self.result, Exception), self.result
        assert self.result.sequences.tolist() == alone.sequences.tolist()
        for name in ("denoise_forwards", "commit_forwards", "prefill_forwards"):
            assert getattr(self.result, name).tolist() == getattr(alone, name).tolist()


class Collector:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.blocks: list[list[int]] = []
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        self.blocks.append(value.flatten().tolist())

    def end(self) -> None:
        self.has_ended = True


@contextmanager
def counting(model: RelayForMaskedDiffusion) -> Iterator[list[int]]:
    """Rows of every forward."""
    rows: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    yield rows
    handle.remove()


def finish(batcher: Batcher, *calls: Call, turns: int = 200) -> None:
    """Adds calls, and decodes until nothing is left."""
    for call in calls:
        batcher.add(call.request)
    for _ in range(turns):
        if not batcher.turn():
            return
    raise AssertionError("decoding does not end")


DRAWN = {"do_sample": True, "temperature": 1.5}


@pytest.mark.parametrize("options", [{}, DRAWN, {"fuse_commits": True}, {"use_sub_block_cache": True}], ids=str)
def test_calls_that_come_at_different_times_as_alone(model: RelayForMaskedDiffusion, options: dict[str, Any]) -> None:
    batcher = Batcher(8, 8)
    calls = []
    for number, (length, new) in enumerate([(5, 40), (27, 12), (16, 30), (3, 1), (9, 50), (40, 17)]):
        seeds = {"sampling_seeds": [number]} if options == DRAWN else {}
        calls.append(Call(model, prompt_of(length), max_new_tokens=new, **options, **seeds))
        batcher.add(calls[-1].request)
        for _ in range(number % 3):
            batcher.turn()
    finish(batcher)
    for call in calls:
        call.assert_as_alone()


def test_call_joins_at_the_next_border_and_leaves_before_others(model: RelayForMaskedDiffusion) -> None:
    batcher = Batcher(8, 8)
    long, short = Call(model, prompt_of(5), max_new_tokens=80), Call(model, prompt_of(13), max_new_tokens=3)
    batcher.add(long.request)
    batcher.turn()
    batcher.add(short.request)
    with counting(model) as rows:
        batcher.turn()
    assert short.result is not None
    assert long.result is None
    assert 2 in rows
    finish(batcher)
    long.assert_as_alone()
    short.assert_as_alone()


def test_many_calls_take_fewer_forwards_than_each_alone(model: RelayForMaskedDiffusion) -> None:
    calls = [Call(model, prompt_of(5 + n), max_new_tokens=24) for n in range(6)]
    with counting(model) as together:
        finish(Batcher(6, 6), *calls)
    with counting(model) as alone:
        finish(Batcher(1, 6), *[Call(model, call.prompt, max_new_tokens=24) for call in calls])
    counts = [
        call.result.denoise_forwards + call.result.commit_forwards + call.result.prefill_forwards for call in calls
    ]
    assert len(alone) == sum(map(int, counts))
    assert max(map(int, counts)) <= len(together) < len(alone) / 3


def test_options_that_differ_are_decoded_in_turns(model: RelayForMaskedDiffusion) -> None:
    differing: list[dict[str, Any]] = [
        {},
        {"unmasking_threshold": 0.9},
        {"unmasking_policy": "confidence_budget", "unmasking_threshold": 1.0},
        {"sub_block_size": 4},
        {"use_relay": False},
        {"eos_token_id": list(range(1, 20))},
        {**DRAWN, "sampling_seeds": [7]},
        {**DRAWN, "temperature": 0.5, "sampling_seeds": [7]},
        {"repetition_penalty": 1.5},
    ]
    calls = [Call(model, prompt_of(11), max_new_tokens=30, **options) for options in differing]
    batcher = Batcher(9, 9)
    for call in calls:
        batcher.add(call.request)
    batcher.turn()
    assert len(batcher._running) == len(calls)
    finish(batcher)
    for call in calls:
        call.assert_as_alone()
    assert len({str(call.result.sequences.tolist()) for call in calls}) > 5


def test_options_of_rows_run_together() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer, open_channel=True, token_shift=True).double()
    model.generation_config.suppress_tokens = all_tokens_but(tokenizer, "abcd")
    text = Call(model, prompt_of(11), max_new_tokens=60)
    finish(Batcher(1, 1), text)
    stop = tokenizer.decode(text.result.sequences[0, 20:22])
    own: list[dict[str, Any]] = [
        {"max_new_tokens": 3},
        {"max_new_tokens": 60},
        {"max_new_tokens": 20, "max_time": 0.0},
        {"max_new_tokens": 60, "stop_strings": [stop]},
    ]
    calls = [Call(model, prompt_of(11), tokenizer=tokenizer, **options) for options in own]
    batcher = Batcher(9, 9)
    for call in calls:
        batcher.add(call.request)
    batcher.turn()
    assert len(batcher._running) == 1
    finish(batcher)
    for call in calls:
        call.assert_as_alone()
    assert [call.result.sequences.shape[1] - 11 for call in calls][:3] == [3, 60, 5]
    assert tokenizer.decode(calls[3].result.sequences[0]).endswith(stop)
    assert calls[3].result.sequences.shape[1] <= 22


def test_room_is_bounded_and_first_come_is_first_served(model: RelayForMaskedDiffusion) -> None:
    batcher = Batcher(2, 3)
    calls = [Call(model, prompt_of(5), max_new_tokens=20) for _ in range(5)]
    for call in calls:
        batcher.add(call.request)
    with pytest.raises(QueueFullError, match="5 requests are waiting, as many as may"):
        batcher.add(Call(model, prompt_of(5)).request)
    with counting(model) as rows:
        batcher.turn()
        assert (batcher.running, batcher.waiting) == (2, 3)
        with pytest.raises(QueueFullError):
            batcher.add(Call(model, prompt_of(5)).request)
        finish(batcher)
    assert max(rows) == 2
    for call in calls:
        call.assert_as_alone()


def test_cancelled_calls_free_their_rows(model: RelayForMaskedDiffusion) -> None:
    batcher = Batcher(2, 8)
    calls = [Call(model, prompt_of(5 + 4 * n), max_new_tokens=40) for n in range(4)]
    for call in calls:
        batcher.add(call.request)
    batcher.turn()
    calls[0].is_cancelled = calls[2].is_cancelled = True
    batcher.turn()
    assert (batcher.running, batcher.waiting) == (2, 0)
    finish(batcher)
    assert calls[0].result is calls[2].result is None
    calls[1].assert_as_alone()
    calls[3].assert_as_alone()


def test_all_cancelled_leaves_nothing(model: RelayForMaskedDiffusion) -> None:
    batcher, call = Batcher(2, 8), Call(model, prompt_of(5), max_new_tokens=40)
    batcher.add(call.request)
    batcher.turn()
    call.is_cancelled = True
    assert not batcher.turn()
    assert call.result is None


def test_what_is_wrong_with_a_call_is_told_at_the_next_border_to_that_one(model: RelayForMaskedDiffusion) -> None:
    batcher = Batcher(1, 8)
    good, bad = Call(model, prompt_of(5), max_new_tokens=40), Call(model, prompt_of(5), unmasking_threshold=7)
    batcher.add(good.request)
    batcher.turn()
    batcher.add(bad.request)
    batcher.turn()
    assert isinstance(bad.result, ValueError)
    assert good.result is None
    finish(batcher)
    good.assert_as_alone()


def test_failing_forward_ends_its_group_alone(model: RelayForMaskedDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher(8, 8)
    others = [Call(model, prompt_of(5), max_new_tokens=40, use_relay=False) for _ in range(2)]
    struck = [Call(model, prompt_of(5), max_new_tokens=40) for _ in range(2)]
    for call in [*others, *struck]:
        batcher.add(call.request)
    batcher.turn()
    denoise = BlockDecoder._denoise

    def fail(self: BlockDecoder, columns: slice) -> None:
        if self.options.use_relay:
            raise MemoryError("no room")
        denoise(self, columns)

    monkeypatch.setattr(BlockDecoder, "_denoise", fail)
    batcher.turn()
    batcher.turn()
    monkeypatch.undo()
    assert [type(call.result) for call in struck] == [MemoryError] * 2
    finish(batcher)
    for call in others:
        call.assert_as_alone()
    finish(batcher, again := Call(model, prompt_of(5), max_new_tokens=9))
    again.assert_as_alone()


def test_streams_get_their_own_blocks(model: RelayForMaskedDiffusion) -> None:
    streams = [Collector() for _ in range(3)]
    calls = [Call(model, prompt_of(5 + 6 * n), streams[n], max_new_tokens=10 + 9 * n) for n in range(3)]
    batcher = Batcher(3, 3)
    for call in calls:
        batcher.add(call.request)
        batcher.turn()
    finish(batcher)
    for call, stream in zip(calls, streams, strict=True):
        call.assert_as_alone()
        assert [token for block in stream.blocks for token in block] == call.result.sequences[0].tolist()
        assert stream.has_ended
        assert all(len(block) <= BLOCK for block in stream.blocks[1:])


def test_columns_of_rows_that_have_left_are_given_back(model: RelayForMaskedDiffusion) -> None:
    """However long the batcher runs, memory is that of the rows in it."""
    batcher = Batcher(2, 2)
    widths = []
    batcher.add(Call(model, prompt_of(5), max_new_tokens=30).request)
    for _ in range(30):
        batcher.turn()
        if batcher.running < 2:
            batcher.add(Call(model, prompt_of(5), max_new_tokens=30).request)
        widths += [group.decoder.grid.tokens.shape[1] for group in batcher._running]
    assert max(widths) <= 2 * (5 + 30 + BLOCK)


def test_static_steps_are_decoded_one_request_at_a_time(make_model: Callable) -> None:
    model = make_model(open_channel=True, token_shift=True)
    batcher = Batcher(4, 8)
    calls = [Call(model, prompt_of(5), max_new_tokens=20, cache_implementation="static") for _ in range(3)]
    for call in calls:
        batcher.add(call.request)
    batcher.turn()
    assert (batcher.running, batcher.waiting) == (1, 2)
    with counting(model) as rows:
        finish(batcher)
    assert set(rows) == {1}
    for call in calls:
        call.assert_as_alone()


def test_canvases_that_wait_are_decoded_together(make_model: Callable) -> None:
    model = make_model(open_channel=True, block_size=None).double()
    calls = [Call(model, prompt_of(5 + 3 * n), max_new_tokens=10 + n) for n in range(3)]
    with counting(model) as rows:
        finish(Batcher(4, 4), *calls)
    assert max(rows) == 3
    for call in calls:
        call.assert_as_alone()
