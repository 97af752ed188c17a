from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_hf.trainers.rollouts import buffer as buffer_module
from relay_hf.trainers.rollouts.batches import NO_NUMBER, number_rows
from relay_hf.trainers.rollouts.buffer import RolloutBuffer
from relay_hf.trainers.rollouts.rows import fresh_rows

from ..conftest import MASK, build_model, build_rows

CONFIG = build_model().config


def whole_blocks(length: int) -> int:
    """Rows are filled up with visible [MASK]s to whole blocks of four."""
    return -(-length // 4) * 4


def filled(text: list[int]) -> list[int]:
    return text + [MASK] * (whole_blocks(len(text)) - len(text))


def refill(buffer: RolloutBuffer, batch: dict[str, torch.Tensor], slots: int | None = None, first: int = 0) -> int:
    """From a source that has this batch and no other; its rows are numbered from `first` on."""
    count = len(batch["input_ids"])
    slots = slots or (count if buffer.rows is None else len(buffer.rows))
    return buffer.refill(iter([number_rows(batch, CONFIG, range(first, first + count))]), slots)


def finish(buffer: RolloutBuffer, rows: list[int]) -> None:
    """Reveals everything in some rows and leaves a state in all of them."""
    buffer.rows.masked[rows] = False
    buffer.rows.relay_state.fill_(1.0)
    buffer.rows.has_state.fill_(True)
    buffer.store(buffer.rows)


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
    refill(buffer, old)
    done = sorted(row for row in finished if row < slots)
    finish(buffer, done)
    replaced = done[:incoming]
    assert refill(buffer, new) == len(replaced)
    for row in range(slots):
        source, index, length = (new, replaced.index(row), lengths[1]) if row in replaced else (old, row, lengths[0])
        assert torch.equal(buffer.rows.clean_ids[row, :length], source["input_ids"][index])
        assert int(buffer.rows.attention_mask[row].sum()) == whole_blocks(length)
        # A new row never inherits the state of the row before it.
        assert bool(buffer.rows.has_state[row]) == (row not in replaced)
        assert float(buffer.rows.relay_state[row].abs().sum()) == 0 or row not in replaced


def test_refill_first_batch_masks_everything_to_be_learned() -> None:
    buffer, batch = RolloutBuffer(CONFIG, keeps_state=True), build_rows(3)
    assert refill(buffer, batch) == 3
    assert torch.equal(buffer.rows.noisy_ids(MASK) == MASK, batch["labels"] != -100)
    assert buffer.rows.relay_state.dtype == torch.float32


def test_refill_nothing_finished_keeps_every_row() -> None:
    buffer = RolloutBuffer(CONFIG, keeps_state=False)
    refill(buffer, build_rows(2, seed=1))
    before = buffer.rows.clean_ids.clone()
    assert refill(buffer, build_rows(2, seed=2)) == 0
    assert torch.equal(buffer.rows.clean_ids, before)


def test_state_dict_restored_is_equal() -> None:
    buffer, other = RolloutBuffer(CONFIG, True), RolloutBuffer(CONFIG, True)
    refill(buffer, build_rows(2))
    finish(buffer, [1])
    other.load_state_dict(buffer.state_dict())
    restored = other.state_dict()
    assert restored.pop("entered").tolist() == [2, 18], "rows, and what is learned of them"
    assert restored.pop("numbers").tolist() == [0, 1]
    assert all(torch.equal(getattr(buffer.rows, n), t) for n, t in restored.items())
    assert len(restored) == 6


def test_state_dict_before_first_batch_is_empty() -> None:
    assert RolloutBuffer(CONFIG, True).state_dict() == {}


def test_fresh_rows_without_state_allocates_none() -> None:
    assert fresh_rows(CONFIG, build_rows(2), keeps_state=False).relay_state is None


def test_refill_longest_row_gone_narrows_the_buffer() -> None:
    buffer = RolloutBuffer(CONFIG, keeps_state=True)
    refill(buffer, build_rows(2, length=14))
    finish(buffer, [0, 1])
    refill(buffer, build_rows(2, length=6))
    assert buffer.rows.masked.shape == (2, 8)
    assert buffer.rows.relay_state.shape == (2, 8, 16)


@pytest.mark.parametrize("keeps_state", [True, False])
def test_load_state_dict_of_another_objective_raises(keeps_state: bool) -> None:
    saved = RolloutBuffer(CONFIG, keeps_state)
    refill(saved, build_rows(2))
    with pytest.raises(ValueError, match="of another objective"):
        RolloutBuffer(CONFIG, not keeps_state).load_state_dict(saved.state_dict())


@settings(max_examples=50, deadline=None)
@given(
    slots=st.integers(1, 4),
    batches=st.lists(st.tuples(st.integers(1, 5), st.integers(4, 14)), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_rows_come_in_the_order_of_the_data_until_none_is_left(
    slots: int, batches: list[tuple[int, int]], seed: int
) -> None:
    """A model of the buffer in plain Python: first come, first served, and no row is lost."""
    buffer = RolloutBuffer(CONFIG, keeps_state=True)
    made = [build_rows(count, length, seed=number) for number, (count, length) in enumerate(batches)]
    texts = [text for batch in made for text in batch["input_ids"].tolist()]
    numbers = iter(range(len(texts)))
    source = iter([number_rows(batch, CONFIG, [next(numbers) for _ in batch["labels"]]) for batch in made])
    generator = torch.Generator().manual_seed(seed)
    coming, held = list(range(len(texts))), [NO_NUMBER] * slots
    while coming or set(held) != {NO_NUMBER}:
        free = [slot for slot in range(slots) if held[slot] == NO_NUMBER][: len(coming)]
        for slot in free:
            held[slot] = coming.pop(0)
        assert buffer.refill(source, slots) == len(free)
        for number, row in ((n, buffer.rows.clean_ids[slot].tolist()) for slot, n in enumerate(held) if n >= 0):
            assert row[: whole_blocks(len(texts[number]))] == filled(texts[number])
        waiting = [number for number, _ in buffer.queue]
        assert waiting == coming[: len(waiting)]
        assert buffer.unfinished == [number for number in held if number >= 0] + waiting
        done = [slot for slot in range(slots) if torch.rand((), generator=generator) < 0.5]
        finish(buffer, done)
        held = [NO_NUMBER if slot in done else number for slot, number in enumerate(held)]


def test_rows_without_a_place_are_dropped_as_published() -> None:
    buffer = RolloutBuffer(CONFIG, keeps_state=True, drops_rows=True)
    refill(buffer, build_rows(3), slots=2)
    assert buffer.queue == []
    finish(buffer, [1])
    batch = build_rows(3, seed=1)
    assert refill(buffer, batch) == 1
    assert torch.equal(buffer.rows.clean_ids[1], batch["input_ids"][0])


def test_state_dict_with_queue_restored_goes_on_equally() -> None:
    buffer, other = (RolloutBuffer(CONFIG, True) for _ in range(2))
    refill(buffer, build_rows(5, length=9), slots=2)
    other.load_state_dict({name: tensor.clone() for name, tensor in buffer.state_dict().items()})
    for one in (buffer, other):
        finish(one, [0, 1])
        assert refill(one, build_rows(1, length=5, seed=2)) == 2
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in buffer.state_dict().items())
    assert len(buffer.queue) == 1


def test_state_dict_of_an_earlier_version_goes_on_equally() -> None:
    """Its names differ, and its queue holds rows that are filled up to whole blocks."""
    buffer, other = (RolloutBuffer(CONFIG, True) for _ in range(2))
    refill(buffer, build_rows(3, length=9), slots=2)
    state = buffer.state_dict()
    counted = {"numbers", "queue_numbers", "entered"}
    early = {name.replace("learned", "maskable"): tensor for name, tensor in state.items() if name not in counted}
    (_, (ids, learned, _)), fill = buffer.queue[0], whole_blocks(9) - 9
    early["queue_ids"] = torch.cat([ids, torch.full((fill,), MASK)])
    early["queue_maskable"] = torch.cat([learned, torch.zeros(fill, dtype=torch.bool)])
    early["queue_lengths"] = torch.tensor([9 + fill])
    assert {"maskable", "queue_maskable"} <= early.keys()
    other.load_state_dict(early)
    for one in (buffer, other):
        finish(one, [0, 1])
        assert refill(one, build_rows(1, length=5, seed=2)) == 2
    mine, theirs = buffer.state_dict(), other.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine.keys() - counted)
    assert theirs["numbers"].tolist() == [NO_NUMBER, 0], "of rows from the queue nothing is known"


def test_rows_are_built_once_and_only_where_a_place_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, function = [], buffer_module.all_masked
    monkeypatch.setattr(buffer_module, "all_masked", lambda *args: calls.append(len(args[1])) or function(*args))
    buffer = RolloutBuffer(CONFIG, keeps_state=True)
    refill(buffer, build_rows(3), slots=2)
    refill(buffer, build_rows(3, seed=1))
    assert calls == [2], "two of three rows"


def test_refill_fewer_slots_lets_unfinished_rows_begin_again() -> None:
    buffer = RolloutBuffer(CONFIG, keeps_state=True)
    batch = build_rows(4)
    refill(buffer, batch)
    finish(buffer, [2])
    assert refill(buffer, build_rows(1, seed=1), slots=2) == 0
    assert torch.equal(buffer.rows.clean_ids, batch["input_ids"][:2])
    assert torch.equal(buffer.queue[0][1][0], batch["input_ids"][3])
    assert (buffer.numbers, buffer.unfinished) == ([0, 1], [0, 1, 3])


def test_refill_more_slots_takes_rows_from_the_queue() -> None:
    buffer = RolloutBuffer(CONFIG, keeps_state=True)
    refill(buffer, build_rows(2))
    incoming = build_rows(3, length=14, seed=1)
    assert refill(buffer, incoming, slots=4) == 2
    assert torch.equal(buffer.rows.clean_ids[2:, :14], incoming["input_ids"][:2])
    assert len(buffer.queue) == 1


def test_refill_row_without_labels_is_passed_over() -> None:
    buffer, batch = RolloutBuffer(CONFIG, keeps_state=True), build_rows(3)
    batch["labels"][1] = -100
    assert refill(buffer, batch) == 2
    assert torch.equal(buffer.rows.clean_ids[:2], batch["input_ids"][[0, 2]])
    assert bool(buffer.rows.is_finished[2])


def test_staggered_buffer_starts_out_of_phase_only_once_and_its_rows_come_again() -> None:
    buffer = RolloutBuffer(CONFIG, keeps_state=True, staggered=True)
    refill(buffer, build_rows(4))
    masked = buffer.rows.masked.sum(-1)
    assert masked[0] == 9
    assert masked[3] < 9
    assert buffer.unfinished == [0, 1, 2, 3], "they wait"
    finish(buffer, [0, 1, 2, 3])
    refill(buffer, build_rows(4, seed=1))
    assert torch.equal(buffer.rows.masked, buffer.rows.learned)
    assert buffer.numbers == [0, 1, 2, 3]


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
    refill(buffer, build_rows(2))
    state = {name: tensor.clone() for name, tensor in buffer.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match="rollout buffer is damaged, or of another model or tokenizer"):
        RolloutBuffer(config, keeps_state=True).load_state_dict(state)
