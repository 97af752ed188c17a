"""`output_history`: which forward revealed which token, equal to a plain loop and to every row alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from relay_hf import RelayForMaskedDiffusion
from relay_hf.modeling import generation_given_relay

from ..conftest import MASK
from .decoding import decode_alone, padded, prompt_of, prompts_of, run

ROWS = (3, 8, 13, 16)


@pytest.fixture
def model(make_model: Callable) -> RelayForMaskedDiffusion:
    return make_model(open_channel=True, token_shift=True)


def watch(model: RelayForMaskedDiffusion, inputs: Any, **options: Any) -> Any:
    return run(model, inputs, output_history=True, **options)


class Drafts(BaseStreamer):
    """Keeps the block that every denoise forward left."""

    def __init__(self) -> None:
        self.blocks: list[list[int]] = []

    def put(self, value: Tensor) -> None: ...

    def put_draft(self, value: Tensor) -> None:
        self.blocks.append(value.tolist())

    def end(self) -> None: ...


# -- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("side", ["left", "mixed"])
def test_history_ragged_batch_equals_plain_loop(make_model: Callable, side: str, token_shift: bool) -> None:
    model, prompts = make_model(open_channel=True, token_shift=token_shift), prompts_of(ROWS)
    eos = decode_alone(model, prompts[0], 21, threshold=0.3, sub_block_size=4).tokens[9]
    inputs = padded(prompts, side)
    history = watch(model, inputs, max_new_tokens=21, sub_block_size=4, eos_token_id=eos).history
    width = inputs["input_ids"].shape[1]
    for row, prompt in enumerate(prompts):
        alone = decode_alone(model, prompt, 21, threshold=0.3, sub_block_size=4, eos_token_id=eos)
        behind = 21 - len(alone.tokens)
        assert history.revealed_at[row, width:].tolist() == alone.revealed_at + [-1] * behind
        expected = torch.tensor(alone.confidence + [0.0] * behind)
        torch.testing.assert_close(history.confidence[row, width:], expected, atol=1e-5, rtol=1e-4)
    assert (history.revealed_at[:, -1] == -1).any()  # one row really stopped early


def test_history_prompt_and_padding(model: RelayForMaskedDiffusion) -> None:
    inputs = padded(prompts_of(ROWS), "mixed")
    output = watch(model, inputs, max_new_tokens=5)
    history, is_text = output.history, inputs["attention_mask"].bool()
    for tensor in (history.revealed_at, history.confidence, history.given):
        assert tensor.shape == output.sequences.shape
    assert history.revealed_at[:, :-5].equal(torch.where(is_text, 0, -1))
    assert history.given[:, :-5].equal(is_text)
    assert not history.given[:, -5:].any()
    assert (history.confidence[:, :-5] == 0).all()
    assert (history.confidence[:, -5:] > 0).all()
    assert history.denoise_forwards.equal(output.denoise_forwards)
    assert (history.revealed_at.dtype, history.confidence.dtype) == (torch.long, torch.float32)


def test_history_first_token_of_block_is_free_with_token_shift_only(make_model: Callable) -> None:
    """Of a prompt of one block, columns 8, 16 and 24 start a block; without the shift a forward has to reveal them."""
    for token_shift, free in ((True, [8, 16, 24]), (False, [])):
        model = make_model(open_channel=True, token_shift=token_shift)
        history = watch(model, prompt_of(8), max_new_tokens=20).history
        assert ((history.revealed_at[0] == 0) & ~history.given[0]).nonzero()[:, 0].tolist() == free


def test_history_agrees_with_drafts_of_a_streamer(make_model: Callable) -> None:
    """A position is a mask in the drafts before the forward that reveals it, and never again."""
    model, drafts = make_model(open_channel=True, block_size=None), Drafts()
    output = watch(model, prompt_of(5), max_new_tokens=19, streamer=drafts)
    revealed_at, new = output.history.revealed_at[0, 5:], output.sequences[0, 5:]
    assert len(drafts.blocks) == output.denoise_forwards[0] > 3
    for forward, block in enumerate(drafts.blocks, start=1):
        assert block == torch.where(revealed_at <= forward, new, MASK).tolist()


def test_history_canvas_clues_given_and_blanks_counted(make_model: Callable) -> None:
    model = make_model(open_channel=True, block_size=None, relay_scope="all", relay_readout="pre_norm")
    canvas = torch.arange(32).reshape(2, 16)
    canvas[0, ::3], canvas[1, 2:] = MASK, MASK
    output = watch(model, canvas, unmasking_threshold=0.0)  # a budget of nothing: one at a time
    blank, history = canvas == MASK, output.history
    assert history.given.equal(~blank)
    assert (history.revealed_at[~blank] == 0).all()
    for row in range(2):
        assert sorted(history.revealed_at[row][blank[row]].tolist()) == list(range(1, int(blank[row].sum()) + 1))
    assert (history.confidence[blank] > 0).all()


def test_history_stop_criterion_cuts_tokens_but_not_the_count(model: RelayForMaskedDiffusion) -> None:
    class SecondToken(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.tensor([input_ids.shape[1] >= 10])

    options = {"max_new_tokens": 8, "sub_block_size": 2, "unmasking_threshold": 1.0}
    history = watch(model, prompt_of(8), stopping_criteria=[SecondToken()], **options).history
    assert history.revealed_at[0, 8:].tolist() == [0, 1]
    assert history.denoise_forwards.tolist() == [7]


def test_history_sampled_confidence_is_that_of_the_drawn_token(model: RelayForMaskedDiffusion) -> None:
    """Of two tokens left by `top_k`, some draws take the less probable one."""
    torch.manual_seed(0)
    output = watch(model, prompt_of(5), max_new_tokens=40, do_sample=True, top_k=2)
    confidence = output.history.confidence[0, 5:]
    assert ((confidence > 0) & (confidence <= 1)).all()
    assert (confidence < 0.5).any()
    assert (confidence > 0.5).any()


# -- who shares the batch --------------------------------------------------------------------------------------------


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 17), min_size=2, max_size=3),
    side=st.sampled_from(["left", "right", "mixed"]),
    new_tokens=st.integers(1, 12),
    sub_block_size=st.sampled_from([None, 2, 4]),
    eos=st.sampled_from([None, 7, 19]),
    seed=st.integers(0, 5),
    block_size=st.sampled_from([8, None]),
)
def test_history_of_a_row_does_not_depend_on_the_batch(
    make_model: Callable,
    lengths: list[int],
    side: str,
    new_tokens: int,
    sub_block_size: int | None,
    eos: int | None,
    seed: int,
    block_size: int | None,
) -> None:
    """In double precision, because the state carries every rounding error on, and makes it larger."""
    model = make_model(open_channel=True, token_shift=seed % 2 == 0, block_size=block_size, seed=seed).double()
    prompts, options = prompts_of(tuple(lengths), seed), {"sub_block_size": sub_block_size, "eos_token_id": eos}
    inputs = padded(prompts, side)
    together = watch(model, inputs, max_new_tokens=new_tokens, **options).history
    width = inputs["input_ids"].shape[1]
    for row, prompt in enumerate(prompts):
        alone = watch(model, prompt[None], max_new_tokens=new_tokens, **options).history
        seen = inputs["attention_mask"][row].bool().nonzero()[:, 0].tolist()
        seen += range(width, width + alone.given.shape[1] - len(prompt))
        assert together.revealed_at[row, seen].equal(alone.revealed_at[0])
        assert together.given[row, seen].equal(alone.given[0])
        assert together.denoise_forwards[row] == alone.denoise_forwards[0]
        torch.testing.assert_close(together.confidence[row, seen], alone.confidence[0], atol=1e-6, rtol=1e-6)
        rest = [column for column in range(together.given.shape[1]) if column not in seen]
        assert (together.revealed_at[row, rest] == -1).all()


# -- the option ------------------------------------------------------------------------------------------------------


def test_history_not_asked_for_nothing_recorded(
    model: RelayForMaskedDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("a recorder was made")

    expected = watch(model, prompt_of(5), max_new_tokens=12)
    monkeypatch.setattr(generation_given_relay, "RevealRecorder", fail)
    output = run(model, prompt_of(5), max_new_tokens=12)
    assert output.history is None
    assert "history" not in output
    assert output.sequences.equal(expected.sequences)  # watching changes nothing
    assert output.denoise_forwards.equal(expected.denoise_forwards)


def test_history_from_generation_config_object(model: RelayForMaskedDiffusion) -> None:
    config = GenerationConfig(max_new_tokens=4, output_history=True, return_dict_in_generate=True)
    assert model.generate(prompt_of(5), generation_config=config).history.given.shape == (1, 9)


def test_history_misspelt_option_raises(model: RelayForMaskedDiffusion) -> None:
    with pytest.raises(ValueError, match=r"not used by the model: \['output_histroy'\]"):
        run(model, prompt_of(5), max_new_tokens=4, output_histroy=True)
