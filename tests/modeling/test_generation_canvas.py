"""Whole-sequence models fill in the masks of a canvas and leave its clues alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from relay_hf import RelayForMaskedDiffusion

from ..conftest import MASK
from .decoding import padded, run


@pytest.fixture
def canvas_model(make_model: Callable) -> RelayForMaskedDiffusion:
    """A whole-sequence model with the channels of the Sudoku instance, open."""
    options = {"block_size": None, "relay_scope": "all", "relay_readout": "pre_norm", "relay_init": "ones"}
    return make_model(open_channel=True, **options)


@pytest.fixture
def canvas() -> Tensor:
    """(3, 16): the first row has few blanks, the second many, the third one."""
    ids = torch.arange(48).reshape(3, 16)
    ids[0, ::5], ids[1, 2:], ids[2, 7] = MASK, MASK, MASK
    return ids


def test_generate_canvas_filled_and_clues_kept(canvas_model: RelayForMaskedDiffusion, canvas: Tensor) -> None:
    output = canvas_model.generate(canvas, return_dict_in_generate=True)
    clues = canvas != MASK
    assert output.sequences.shape == canvas.shape
    assert torch.equal(output.sequences[clues], canvas[clues])
    assert not (output.sequences == MASK).any()
    assert output.commit_forwards.tolist() == output.prefill_forwards.tolist() == [0, 0, 0]
    forwards = output.denoise_forwards
    assert forwards[2] == 1
    assert output.tokens_per_forward.tolist() == pytest.approx((torch.tensor([4, 14, 1]) / forwards).tolist())


@pytest.mark.parametrize("use_relay", [False, True])
@pytest.mark.parametrize("token_shift", [False, True])
def test_generate_canvas_rows_equal_rows_alone(
    make_model: Callable, canvas: Tensor, use_relay: bool, token_shift: bool
) -> None:
    model = make_model(open_channel=True, block_size=None, token_shift=token_shift, relay_scope="all")
    rows = [canvas[0, :11], canvas[1], canvas[2, 4:]]
    inputs = padded(rows, "mixed")
    together = run(model, inputs, use_relay=use_relay, unmasking_threshold=1.0)
    for row, ids in enumerate(rows):
        alone = run(model, ids[None], use_relay=use_relay, unmasking_threshold=1.0)
        assert together.sequences[row][inputs["attention_mask"][row].bool()].equal(alone.sequences[0])
        assert together.denoise_forwards[row] == alone.denoise_forwards[0]


def test_generate_canvas_equals_plain_loop(canvas_model: RelayForMaskedDiffusion, canvas: Tensor) -> None:
    ids, state = canvas[1:2].clone(), canvas_model.initial_relay_state(1, 16)
    steps = 0
    while (masked := ids == MASK).any():
        with torch.no_grad():
            output = canvas_model(ids, relay_state=state)
        state, steps = output.relay_state, steps + 1
        probability, token = output.logits.index_fill(-1, torch.tensor([MASK]), -1e9).softmax(-1).max(-1)
        best = probability.masked_fill(~masked, -1).argmax()
        ids[0, best] = token[0, best]
    generated = run(canvas_model, canvas[1:2], unmasking_threshold=0.0)  # a budget of nothing: one at a time
    assert generated.sequences.equal(ids)
    assert generated.denoise_forwards.tolist() == [steps] == [14]


def test_generate_canvas_with_max_new_tokens_fills_and_appends(
    canvas_model: RelayForMaskedDiffusion, canvas: Tensor
) -> None:
    output = run(canvas_model, canvas, max_new_tokens=5)
    clues = canvas != MASK
    assert output.sequences.shape == (3, 21)
    assert torch.equal(output.sequences[:, :16][clues], canvas[clues])
    assert not (output.sequences == MASK).any()


def test_generate_canvas_text_without_masks_appended_to(canvas_model: RelayForMaskedDiffusion) -> None:
    assert run(canvas_model, torch.arange(8)[None], max_new_tokens=5).sequences[0, :8].tolist() == list(range(8))


def test_generate_canvas_stop_token_among_clues_ignored(canvas_model: RelayForMaskedDiffusion, canvas: Tensor) -> None:
    output = run(canvas_model, canvas, eos_token_id=1)
    assert torch.equal(output.sequences, run(canvas_model, canvas).sequences)


def test_streamer_canvas_shown_whole(canvas_model: RelayForMaskedDiffusion, canvas: Tensor, capsys: Any) -> None:
    class Printer:
        def put(self, value: Tensor) -> None:
            print("put", *value.flatten().tolist())

        def end(self) -> None:
            print("end")

    output = run(canvas_model, canvas[:1], streamer=Printer())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[1:] == [str(token) for token in canvas[0].tolist()]
    assert lines[1].split()[1:] == [str(token) for token in output.sequences[0].tolist()]
    assert lines[2:] == ["end"]


def test_generate_canvas_sub_blocks_counted_from_the_end_of_each_prompt(canvas_model: RelayForMaskedDiffusion) -> None:
    """16 new tokens behind 13 and behind 5 are two sub-blocks of 8 for both rows; clues' masks come before."""
    prompts = [torch.arange(1, 14), torch.arange(1, 6)]
    inputs = padded(prompts, "left")
    output = run(canvas_model, inputs, max_new_tokens=16, sub_block_size=8, unmasking_policy="fixed_count",
                 unmasking_threshold=8, output_history=True)  # fmt: skip
    assert output.denoise_forwards.tolist() == [2, 2]
    assert output.history.revealed_at[:, 13:].tolist() == [[1] * 8 + [2] * 8] * 2
    prompts[0][[0, 11]] = MASK
    output = run(canvas_model, prompts[0][None], max_new_tokens=8, sub_block_size=8, unmasking_policy="fixed_count",
                 unmasking_threshold=8, output_history=True)  # fmt: skip
    assert output.history.revealed_at[0, [0, 11, 13]].tolist() == [1, 2, 3]


def test_generate_canvas_denoising_steps_spread_over_what_is_masked(canvas_model: RelayForMaskedDiffusion) -> None:
    output = run(canvas_model, torch.arange(1, 14)[None], max_new_tokens=16, denoising_steps=5,
                 unmasking_policy="fixed_count", output_history=True)  # fmt: skip
    assert output.history.revealed_at[0, 13:].unique(return_counts=True)[1].tolist() == [4, 3, 3, 3, 3]
