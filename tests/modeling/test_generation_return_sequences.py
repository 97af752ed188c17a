"""`num_return_sequences`: several samples of every prompt, as rows of their own."""

from collections.abc import Callable

import pytest
import torch

from relay_hf import RelayForMaskedDiffusion

from ..conftest import MASK
from .decoding import padded, prompt_of, prompts_of, run


@pytest.fixture
def model(make_model: Callable) -> RelayForMaskedDiffusion:
    return make_model(open_channel=True, token_shift=True)


def test_return_sequences_follow_their_prompt_with_counts_of_their_own(model: RelayForMaskedDiffusion) -> None:
    torch.manual_seed(0)
    inputs = padded(prompts_of((13, 5)), "left")
    output = run(model, inputs, max_new_tokens=20, do_sample=True, num_return_sequences=3, output_history=True)
    assert output.sequences.shape == (6, 33)
    assert output.sequences[:, :13].equal(inputs["input_ids"].repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in output.sequences[:, 13:].tolist()}) == 6
    assert output.prefill_forwards.tolist() == [1, 1, 1, 0, 0, 0]
    assert output.commit_forwards.tolist() == [3] * 6
    assert len(set(output.denoise_forwards.tolist())) > 2
    assert output.history.revealed_at.amax(-1).equal(output.denoise_forwards)


def test_return_sequences_of_one_choice_equal_greedy(model: RelayForMaskedDiffusion) -> None:
    """One position a step and one token to choose from: nothing is left to chance."""
    inputs = padded(prompts_of((13, 5)), "mixed")
    options = {"max_new_tokens": 12, "unmasking_threshold": 1.0, "sub_block_size": 1}
    copies = run(model, inputs, do_sample=True, top_k=1, num_return_sequences=2, **options)
    greedy = run(model, inputs, **options)
    assert copies.sequences.equal(greedy.sequences.repeat_interleave(2, dim=0))
    assert copies.denoise_forwards.equal(greedy.denoise_forwards.repeat_interleave(2))


def test_return_sequences_that_stop_leave_the_others_alone(model: RelayForMaskedDiffusion) -> None:
    """Nobody's text ends before the token that every other copy still wants."""
    torch.manual_seed(0)
    options = {"max_new_tokens": 30, "do_sample": True, "temperature": 2.0, "num_return_sequences": 8}
    padding = {"pad_token_id": 3, "suppress_tokens": [3]}
    new = run(model, prompt_of(5), eos_token_id=[7, 19, 23], **padding, **options).sequences[:, 5:]
    lengths = (new != 3).sum(-1)
    assert len(set(lengths.tolist())) > 2
    for row, length in zip(new, lengths, strict=True):
        is_stop = torch.isin(row[:length], torch.tensor([7, 19, 23]))
        assert not is_stop[:-1].any()
        assert is_stop[-1] or length == 30


def test_return_sequences_of_a_canvas_differ_in_blanks_only(make_model: Callable) -> None:
    torch.manual_seed(0)
    canvas = torch.arange(12).index_fill(0, torch.arange(1, 12, 2), MASK)[None]
    output = run(make_model(block_size=None), canvas, do_sample=True, temperature=3.0, num_return_sequences=3)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 3
    assert output.sequences[:, ::2].equal(canvas[:, ::2].expand(3, -1))


def test_return_sequences_greedy_raises(model: RelayForMaskedDiffusion) -> None:
    with pytest.raises(ValueError, match=r"Greedy methods.*num_return_sequences"):
        run(model, prompt_of(5), max_new_tokens=4, num_return_sequences=2)
