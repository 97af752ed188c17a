"""The packed buffer takes texts in their order as long as they lie side by side, and keeps those in work."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_hf.trainers.rollouts.batches import NumberedRow, TextRow
from relay_hf.trainers.rollouts.packed_buffer import PackedBuffer
from relay_hf.trainers.rollouts.packing import rows_needed

from ..conftest import build_model

CONFIG = build_model().config


def numbered_texts(lengths: list[int]) -> list[NumberedRow]:
    """Each text consists of its number plus 3."""
    return [
        (number, TextRow(torch.full((length,), number + 3), torch.ones(length, dtype=torch.bool)))
        for number, length in enumerate(lengths)
    ]


def finish(buffer: PackedBuffer, slots: list[int]) -> None:
    masked = buffer.rows.masked.clone()
    masked[slots] = False
    buffer.store(replace(buffer.rows, masked=masked))


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=20),
    rows=st.integers(1, 3),
    done=st.lists(st.sets(st.integers(0, 9)), min_size=1, max_size=5),
)
def test_packed_buffer_any_texts_enter_in_order_while_they_fit(
    lengths: list[int], rows: int, done: list[set[int]]
) -> None:
    buffer, source = PackedBuffer(16, CONFIG, False), iter([numbered_texts(lengths)])
    entered, in_work = 0, set()
    for finished in done:
        new = buffer.refill(source, rows)
        assert buffer.numbers[len(buffer.numbers) - new :] == list(range(entered, entered + new))
        entered += new
        assert entered
        assert in_work <= {*buffer.numbers}
        assert not new or rows_needed(buffer.lengths, 16, 4) <= rows
        for number, length, ids in zip(buffer.numbers, buffer.lengths, buffer.rows.clean_ids.tolist(), strict=True):
            assert not length or length == -(-lengths[number] // 4) * 4
            assert not length or ids[: lengths[number]] == [number + 3] * lengths[number]
        finish(buffer, [slot for slot, number in enumerate(buffer.numbers) if number in finished])
        in_work = {*buffer.unfinished} & {*buffer.numbers}


def test_packed_buffer_fewer_rows_send_texts_back_to_begin_again() -> None:
    buffer = PackedBuffer(16, CONFIG, True)
    buffer.refill(iter([numbered_texts([8, 8, 8, 8])]), 2)
    assert buffer.numbers == [0, 1, 2, 3]
    assert buffer.refill(iter([]), 1) == 0
    assert [number for number, length in zip(buffer.numbers, buffer.lengths, strict=True) if length] == [0, 1]
    assert [number for number, _ in buffer.queue] == [2, 3]


def test_packed_buffer_restored_goes_on_as_the_one_that_was_saved() -> None:
    texts, buffers = numbered_texts([8, 5, 12, 7, 3, 9]), []
    buffer = PackedBuffer(16, CONFIG, True)
    source = iter([texts])
    buffer.refill(source, 2)
    finish(buffer, [0])
    other = PackedBuffer(16, CONFIG, True)
    other.load_state_dict({name: tensor.clone() for name, tensor in buffer.state_dict().items()})
    for each in (buffer, other):
        each.refill(source, 2)
        buffers.append((each.numbers, each.lengths, each.rows.clean_ids.tolist()))
    assert buffers[0] == buffers[1]


def test_packed_buffer_a_text_longer_than_a_row_has_one_of_its_own() -> None:
    buffer = PackedBuffer(8, CONFIG, False)
    assert buffer.refill(iter([numbered_texts([14, 4])]), 1) == 1
    assert buffer.lengths == [16]
