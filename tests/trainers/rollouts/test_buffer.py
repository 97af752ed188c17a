from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_hf.trainers.rollouts import buffer as buffer_module
from relay_hf.trainers.rollouts.buffer import RolloutBuffer
from relay_hf.trainers.rollouts.rows import fresh_rows

from ..conftest import MASK, build_model, build_rows

CONFIG = build_model().config


def whole_blocks(length: int) -> int:
    """Rows are filled up with visible [MASK]s to whole blocks of four."""
    return -(-length // 4) * 4


def filled(text: list[int]) -> list[int]:
    return text + [MASK] * (whole_blocks(len(text)) - len(text))


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
    buffer = RolloutBuffer(CONFIG, keeps_state=True)
    old, new = build_rows(slots, lengths[0], seed=1), build_rows(incoming, lengths[1], seed=2)
    buffer.refill(old)
    done = sorted(row for row in finished if row < slots)
    finish(buffer, done)
    replaced = done[:incoming]
    assert buffer.refill(new) == len(replaced)
    for row in range(slots):
        source, index, length = (new, replaced.index(row), lengths[1]) if row in replaced else (old, row, lengths[0])
        assert torch.equal(buffer.rows.clean_ids[row, :length], source["input_ids"][index])
        assert int(buffer.rows.attention_mask[row].sum()) == whole_blocks(length)
        # A new row never inherits the state of the row before it.
        assert bool(buffer.rows.has_state[row]) == (row not in replaced)
        assert float(buffer.rows.relay_state[row].abs().sum()) == 0 or row not in replaced


def test_refill_first_batch_masks_everything_to_be_learned() -> None:
    buffer, batch = RolloutBuffer(CONFIG, keeps_state=True), build_rows(3)
    assert buffer.refill(batch) == 3
    assert torch.equal(buffer.rows.noisy_ids(MASK) == MASK, batch["labels"] != -100)
    assert buffer.rows.relay_state.dtype == torch.float32


def test_refill_nothing_finished_keeps_every_row() -> None:
    buffer = RolloutBuffer(CONFIG, keeps_state=False)
    buffer.refill(build_rows(2, seed=1))
    before = buffer.rows.clean_ids.clone()
    assert buffer.refill(build_rows(2, seed=2)) == 0
    assert torch.equal(buffer.rows.clean_ids, before)


def test_state_dict_restored_is_equal() -> None:
    buffer, other = RolloutBuffer(CONFIG, True), RolloutBuffer(CONFIG, True)
    buffer.refill(build_rows(2))
    finish(buffer, [1])
    other.load_state_dict(buffer.state_dict())
    restored = other.state_dict()
    assert torch.equal(restored.pop("counts"), torch.tensor([2, 0])), "rows that entered, and that were dropped"
    assert all(torch.equal(getattr(buffer.rows, n), t) for n, t in restored.items())
    assert len(restored) == 6


def test_state_dict_before_first_batch_is_empty() -> None:
    assert RolloutBuffer(CONFIG, True).state_dict() == {}


def test_fresh_rows_without_state_allocates_none() -> None:
    assert fresh_rows(CONFIG, build_rows(2), keeps_state=False).relay_state is None


def test_refill_longest_row_gone_narrows_the_buffer() -> None:
    buffer = RolloutBuffer(CONFIG, keeps_state=True)
    buffer.refill(build_rows(2, length=14))
    finish(buffer, [0, 1])
    buffer.refill(build_rows(2, length=6))
    assert buffer.rows.masked.shape == (2, 8)
    assert buffer.rows.relay_state.shape == (2, 8, 16)


@pytest.mark.parametrize("keeps_state", [True, False])
def test_load_state_dict_of_another_objective_raises(keeps_state: bool) -> None:
    saved = RolloutBuffer(CONFIG, keeps_state)
    saved.refill(build_rows(2))
    with pytest.raises(ValueError, match="of another objective"):
        RolloutBuffer(CONFIG, not keeps_state).load_state_dict(saved.state_dict())


@settings(max_examples=50, deadline=None)
@given(
    slots=st.integers(1, 4),
    batches=st.lists(st.tuples(st.integers(1, 5), st.integers(4, 14)), min_size=1, max_size=6),
    queue_size=st.integers(0, 12),
    seed=st.integers(0, 1000),
)
def test_queue_rows_come_in_the_order_of_the_data(
    slots: int, batches: list[tuple[int, int]], queue_size: int, seed: int
) -> None:
    """A model of the queue in plain Python: first come, first served; what comes when it is full is dropped."""
    buffer = RolloutBuffer(CONFIG, keeps_state=True, queue_size=queue_size)
    generator = torch.Generator().manual_seed(seed)
    waiting: list[list[int]] = []
    held: list[list[int] | None] = [None] * slots
    for number, (count, length) in enumerate(batches):
        batch = build_rows(count, length, seed=number)
        waiting += batch["input_ids"].tolist()
        free = [slot for slot in range(slots) if held[slot] is None]
        taken = list(zip(free, waiting, strict=False))
        for slot, text in taken:
            held[slot] = text
        waiting = waiting[len(taken) :][:queue_size]

        assert buffer.refill(batch, slots) == len(taken)
        assert [row.ids.tolist() for row in buffer.queue] == waiting
        for slot, text in enumerate(held):
            if text is not None:
                assert buffer.rows.clean_ids[slot, : whole_blocks(len(text))].tolist() == filled(text)
                assert not buffer.rows.attention_mask[slot, whole_blocks(len(text)) :].any()
        done = [slot for slot in range(slots) if torch.rand((), generator=generator) < 0.5]
        finish(buffer, done)
        held = [None if slot in done else text for slot, text in enumerate(held)]


def test_state_dict_with_queue_restored_goes_on_equally() -> None:
    buffer, other = (RolloutBuffer(CONFIG, True, queue_size=9) for _ in range(2))
    buffer.refill(build_rows(3, length=9), slots=2)
    buffer.refill(build_rows(2, length=12, seed=1))
    other.load_state_dict({name: tensor.clone() for name, tensor in buffer.state_dict().items()})
    for one in (buffer, other):
        finish(one, [0, 1])
        assert one.refill(build_rows(1, length=5, seed=2)) == 2
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in buffer.state_dict().items())
    assert len(buffer.queue) == 2


def test_state_dict_of_an_earlier_version_goes_on_equally() -> None:
    """Its names differ, and its queue holds rows that are filled up to whole blocks."""
    buffer, other = (RolloutBuffer(CONFIG, True, queue_size=9) for _ in range(2))
    buffer.refill(build_rows(3, length=9), slots=2)
    state = buffer.state_dict()
    early = {name.replace("learned", "maskable"): tensor for name, tensor in state.items()}
    (ids, learned, _), fill = buffer.queue[0], whole_blocks(9) - 9
    early["queue_ids"] = torch.cat([ids, torch.full((fill,), MASK)])
    early["queue_maskable"] = torch.cat([learned, torch.zeros(fill, dtype=torch.bool)])
    early["queue_lengths"] = torch.tensor([9 + fill])
    assert {"maskable", "queue_maskable"} <= early.keys()
    other.load_state_dict(early)
    for one in (buffer, other):
        finish(one, [0, 1])
        assert one.refill(build_rows(1, length=5, seed=2)) == 2
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in buffer.state_dict().items())


def test_rows_are_read_and_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("read_batch", "all_masked"):
        function = getattr(buffer_module, name)
        monkeypatch.setattr(buffer_module, name, lambda *a, n=name, f=function: calls.append(n) or f(*a))
    buffer = RolloutBuffer(CONFIG, keeps_state=True, queue_size=9)
    buffer.refill(build_rows(3), slots=2)
    assert calls == ["read_batch", "all_masked"]
    buffer.refill(build_rows(3, seed=1))
    assert calls[2:] == ["read_batch"], "no place is free"


def test_refill_fewer_slots_lets_unfinished_rows_begin_again() -> None:
    buffer = RolloutBuffer(CONFIG, keeps_state=True, queue_size=9)
    batch = build_rows(4)
    buffer.refill(batch)
    finish(buffer, [2])
    assert buffer.refill(build_rows(1, seed=1), slots=2) == 0
    assert torch.equal(buffer.rows.clean_ids, batch["input_ids"][:2])
    assert torch.equal(buffer.queue[0][0], batch["input_ids"][3])
    assert len(buffer.queue) == 2


def test_refill_more_slots_takes_rows_from_the_queue() -> None:
    buffer = RolloutBuffer(CONFIG, keeps_state=True, queue_size=9)
    buffer.refill(build_rows(2))
    incoming = build_rows(3, length=14, seed=1)
    assert buffer.refill(incoming, slots=4) == 2
    assert torch.equal(buffer.rows.clean_ids[2:, :14], incoming["input_ids"][:2])
    assert len(buffer.queue) == 1


def test_refill_row_without_labels_is_passed_over() -> None:
    buffer, batch = RolloutBuffer(CONFIG, keeps_state=True, queue_size=9), build_rows(3)
    batch["labels"][1] = -100
    assert buffer.refill(batch) == 2
    assert torch.equal(buffer.rows.clean_ids[:2], batch["input_ids"][[0, 2]])
    assert bool(buffer.rows.is_finished[2])


def test_staggered_buffer_starts_out_of_phase_only_once() -> None:
    buffer = RolloutBuffer(CONFIG, keeps_state=True, queue_size=9, staggered=True)
    buffer.refill(build_rows(4))
    masked = buffer.rows.masked.sum(-1)
    assert masked[0] == 9
    assert masked[3] < 9
    finish(buffer, [0, 1, 2, 3])
    buffer.refill(build_rows(4, seed=1))
    assert torch.equal(buffer.rows.masked, buffer.rows.learned)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["clean_ids"].fill_(40),
        lambda state: state["clean_ids"].fill_(MASK),
        lambda state: state.update(relay_state=state["relay_state"][..., :-1]),
        lambda state: state.update(masked=state["masked"][:, :-1]),
        lambda state: state.pop("clean_ids"),
    ],
    ids=["vocabulary", "mask token", "width", "length", "missing"],
)
def test_load_state_dict_of_another_model_raises(change: Callable) -> None:
    config = build_model().config
    buffer = RolloutBuffer(config, keeps_state=True)
    buffer.refill(build_rows(2))
    state = {name: tensor.clone() for name, tensor in buffer.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match="rollout buffer is damaged, or of another model or tokenizer"):
        RolloutBuffer(config, keeps_state=True).load_state_dict(state)
