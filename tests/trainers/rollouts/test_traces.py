"""Rows that are revealed as a trace of decoding revealed them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_hf.testing import tiny_model
from relay_hf.traces import decode_traces
from relay_hf.trainers.rollouts.batches import number_rows
from relay_hf.trainers.rollouts.buffer import RolloutBuffer
from relay_hf.trainers.rollouts.noise import stagger
from relay_hf.trainers.rollouts.rollout import FollowTrace
from relay_hf.trainers.rollouts.rows import RolloutRows, fresh_rows

from ..conftest import build_model, build_rows

CONFIG = build_model().config


def traced(rows: dict[str, torch.Tensor], most: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch with random traces."""
    generator = torch.Generator().manual_seed(seed)
    return {**rows, "reveal_steps": torch.randint(0, most, rows["input_ids"].shape, generator=generator)}


@settings(max_examples=100, deadline=None)
@given(
    block_size=st.one_of(st.none(), st.integers(1, 6)),
    length=st.integers(1, 14),
    stride=st.integers(1, 4),
    seed=st.integers(0, 10_000),
)
def test_follow_trace_reveals_as_a_plain_loop(block_size: int | None, length: int, stride: int, seed: int) -> None:
    batch = traced(build_rows(2, length, prompt=0, seed=seed), seed=seed)
    rows = fresh_rows(build_model(block_size=None).config, batch, keeps_state=False)
    rows = replace(rows, masked=torch.rand(rows.masked.shape, generator=torch.Generator().manual_seed(seed)) < 0.6)
    expected = torch.zeros_like(rows.masked)
    for row in range(2):
        for begin in range(0, length, block_size or length):
            block = [p for p in range(begin, min(begin + (block_size or length), length)) if rows.masked[row, p]]
            step = {place: max(int(batch["reveal_steps"][row, place]), 1) for place in block}
            for place in block:
                expected[row, place] = step[place] < min(step.values()) + stride
    follow = FollowTrace(stride, block_size)
    assert torch.equal(follow.upcoming(rows), expected)
    assert torch.equal(follow(rows, torch.zeros(0)).masked, rows.masked & ~expected)


@pytest.mark.parametrize(
    "options", [{}, {"token_shift": True}, {"block_size": None}], ids=["blocks", "shift", "canvas"]
)
def test_trace_of_generate_followed_by_single_steps_reveals_what_generate_revealed(options: dict[str, Any]) -> None:
    model = tiny_model(open_channel=True, **options)
    prompt, seen = torch.tensor([[5, 9, 4], [0, 7, 2]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    decoding = {"max_new_tokens": 18, "unmasking_threshold": 0.15}
    output = model.generate(
        prompt, attention_mask=seen, return_dict_in_generate=True, output_history=True, eos_token_id=None, **decoding
    )
    traces = decode_traces(model, [[5, 9, 4], [7, 2]], {"eos_token_id": None, **decoding})
    for row, trace in enumerate(traces):
        assert trace.input_ids == output.sequences[row, row:].tolist()
        revealed_at = output.history.revealed_at[row, row:]
        size = model.config.block_size or len(revealed_at)
        batch = {name: torch.tensor([getattr(trace, name)]) for name in ("input_ids", "labels", "reveal_steps")}
        rows = fresh_rows(model.config, batch, keeps_state=False)
        follow, steps = FollowTrace(1, model.config.block_size), []
        while rows.masked.any():
            steps.append((rows.masked & ~(rows := follow(rows, torch.zeros(0))).masked)[0, : len(revealed_at)])
        for begin in range(0, len(revealed_at), size):
            block = revealed_at[begin : begin + size]
            written = torch.tensor(trace.labels[begin : begin + size]) != -100
            forwards = [block == n for n in block[block > 0].unique()]
            forwards[0] = (forwards[0] | (block == 0)) & written  # known before: learned in the first step
            followed = [step[begin : begin + size] for step in steps if step[begin : begin + size].any()]
            assert torch.equal(torch.stack(followed), torch.stack(forwards))


def test_stagger_starts_rows_along_their_traces() -> None:
    rows = stagger(fresh_rows(CONFIG, traced(build_rows(4)), keeps_state=False))
    assert torch.equal(rows.masked[0], rows.learned[0])
    for row in range(1, 4):
        step, masked = rows.reveal_steps[row].clamp(min=1), rows.masked[row]
        assert step[masked].min() >= step[rows.learned[row] & ~masked].max()
    assert torch.equal(rows.masked.sum(-1), rows.masked.sum(-1).sort(descending=True).values)


def test_buffer_keeps_traces_beside_their_texts() -> None:
    buffer, other = (RolloutBuffer(CONFIG, keeps_state=True, has_traces=True) for _ in range(2))
    batch, later = traced(build_rows(4)), traced(build_rows(1), seed=1)
    buffer.refill(iter([number_rows(batch, CONFIG, range(4))]), slots=2)
    other.load_state_dict(buffer.state_dict())
    for one in (buffer, other):
        one.store(replace(one.rows, masked=torch.zeros_like(one.rows.masked)))
        one.refill(iter([number_rows(later, CONFIG, [4])]), slots=3)
        assert torch.equal(one.rows.reveal_steps[:2], batch["reveal_steps"][2:])
        assert torch.equal(one.rows.reveal_steps[2], later["reveal_steps"][0])


def test_buffer_without_any_row_follows_a_trace_of_nothing() -> None:
    buffer = RolloutBuffer(CONFIG, keeps_state=False, has_traces=True)
    assert buffer.refill(iter([]), slots=2) == 0
    assert not FollowTrace(2, CONFIG.block_size).upcoming(buffer.rows).any()


def test_buffer_of_rows_without_traces_is_refused() -> None:
    buffer = RolloutBuffer(CONFIG, keeps_state=False)
    buffer.refill(iter([number_rows(build_rows(2), CONFIG, range(2))]), slots=2)
    with pytest.raises(ValueError, match="of another objective"):
        RolloutBuffer(CONFIG, keeps_state=False, has_traces=True).load_state_dict(buffer.state_dict())


def test_rows_without_a_trace_have_none() -> None:
    rows: RolloutRows = fresh_rows(CONFIG, build_rows(2), keeps_state=False)
    assert rows.reveal_steps is None
    assert rows.fit(16).reveal_steps is None
