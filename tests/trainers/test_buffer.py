import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_hf.trainers.buffer import RolloutBuffer
from relay_hf.trainers.rows import fresh_rows

from .conftest import MASK, build_model, build_rows

CONFIG = build_model().config


def finish(buffer: RolloutBuffer, rows: list[int]) -> None:
    """Reveals everything in some rows and leaves a state in all of them."""
    buffer.rows.masked[rows] = False
    buffer.rows.relay_state.fill_(1.0)
    buffer.rows.has_state.fill_(True)


@settings(max_examples=50, deadline=None)
@given(
    slots=st.integers(1, 5),
    finished=st.sets(st.integers(0, 4)),
    incoming=st.integers(1, 6),
    lengths=st.tuples(st.integers(4, 14), st.integers(4, 14)),
)
def test_refill_any_shapes_replaces_finished_rows_in_order(
    slots: int, finished: set[int], incoming: int, lengths: tuple[int, int]
) -> None:
    buffer = RolloutBuffer(CONFIG, carries_state=True)
    old, new = build_rows(slots, lengths[0], seed=1), build_rows(incoming, lengths[1], seed=2)
    buffer.refill(old)
    done = sorted(row for row in finished if row < slots)
    finish(buffer, done)
    replaced = done[:incoming]
    assert buffer.refill(new) == len(replaced)
    for row in range(slots):
        source, index, length = (new, replaced.index(row), lengths[1]) if row in replaced else (old, row, lengths[0])
        assert torch.equal(buffer.rows.clean_ids[row, :length], source["input_ids"][index])
        assert int(buffer.rows.attention_mask[row].sum()) == length
        # A new row never inherits the state of the row before it.
        assert bool(buffer.rows.has_state[row]) == (row not in replaced)
        assert float(buffer.rows.relay_state[row].abs().sum()) == 0 or row not in replaced


def test_refill_first_batch_masks_everything_to_be_learned() -> None:
    buffer, batch = RolloutBuffer(CONFIG, carries_state=True), build_rows(3)
    assert buffer.refill(batch) == 3
    assert torch.equal(buffer.rows.noisy_ids(MASK) == MASK, batch["labels"] != -100)
    assert buffer.rows.relay_state.dtype == torch.float32


def test_refill_nothing_finished_keeps_every_row() -> None:
    buffer = RolloutBuffer(CONFIG, carries_state=False)
    buffer.refill(build_rows(2, seed=1))
    before = buffer.rows.clean_ids.clone()
    assert buffer.refill(build_rows(2, seed=2)) == 0
    assert torch.equal(buffer.rows.clean_ids, before)


def test_state_dict_restored_is_equal() -> None:
    buffer, other = RolloutBuffer(CONFIG, True), RolloutBuffer(CONFIG, True)
    buffer.refill(build_rows(2))
    finish(buffer, [1])
    other.load_state_dict(buffer.state_dict())
    assert all(torch.equal(getattr(buffer.rows, n), t) for n, t in other.state_dict().items())
    assert len(other.state_dict()) == 6


def test_state_dict_before_first_batch_is_empty() -> None:
    assert RolloutBuffer(CONFIG, True).state_dict() == {}


def test_fresh_rows_without_state_allocates_none() -> None:
    assert fresh_rows(CONFIG, build_rows(2), carries_state=False).relay_state is None


def test_refill_longest_row_gone_narrows_the_buffer() -> None:
    buffer = RolloutBuffer(CONFIG, carries_state=True)
    buffer.refill(build_rows(2, length=14))
    finish(buffer, [0, 1])
    buffer.refill(build_rows(2, length=6))
    assert buffer.rows.masked.shape == (2, 6)
    assert buffer.rows.relay_state.shape == (2, 6, 16)


@pytest.mark.parametrize("carries_state", [True, False])
def test_load_state_dict_of_another_objective_raises(carries_state: bool) -> None:
    saved = RolloutBuffer(CONFIG, carries_state)
    saved.refill(build_rows(2))
    with pytest.raises(ValueError, match="of another objective"):
        RolloutBuffer(CONFIG, not carries_state).load_state_dict(saved.state_dict())
