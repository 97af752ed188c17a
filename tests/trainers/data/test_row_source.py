"""Every row of every epoch is drawn once, whatever the number of processes, and wherever a run goes on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, default_collate

from relay_hf.trainers.data.row_source import STREAM, RowSource, make_row_source

from ..conftest import build_model

CONFIG = build_model().config


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = default_collate([row["row"] for row in rows])[:, None].expand(-1, 4).contiguous()
    return {"input_ids": ids, "labels": ids}


def make_source(
    rows: int | Any = 10,
    batch_size: int = 3,
    process: int = 0,
    processes: int = 1,
    shuffle: bool = True,
    drops_last: bool = False,
    collate_fn: Callable = collate,
    workers: int = 0,
    epochs: float | None = None,
) -> RowSource:
    data = Dataset.from_dict({"row": list(range(rows))}) if isinstance(rows, int) else rows
    loader = DataLoader(data, batch_size, collate_fn=collate_fn, num_workers=workers)
    kind = RandomSampler if shuffle else SequentialSampler
    options = {"make_sampler": lambda: kind(data), "seed": 0, "drops_last": drops_last}
    source = make_row_source(data, loader, CONFIG, batch_size, process, processes, **options)
    if epochs is not None:
        source.stop_after(epochs)
    return source


def drawn(source: RowSource, batches: int | None = None) -> list[tuple[int, int]]:
    """Number and text of the rows of some batches, or of all."""
    taken = [next(source) for _ in range(batches)] if batches is not None else list(source)
    return [(number, int(row.ids[0])) for batch in taken for number, row in batch]


SIZES = {"rows": st.integers(1, 12), "batch_size": st.integers(1, 5), "processes": st.integers(1, 4)}


@settings(max_examples=40, deadline=None)
@given(**SIZES, halves=st.integers(1, 5))
def test_processes_together_draw_every_row_of_every_epoch_once(
    rows: int, batch_size: int, processes: int, halves: int
) -> None:
    sources = [make_source(rows, batch_size, p, processes, epochs=halves / 2) for p in range(processes)]
    everything = sorted(pair for source in sources for pair in drawn(source))
    assert [number for number, _ in everything] == list(range(len(everything)))
    assert len(everything) == sources[0].rows_of(halves / 2) == rows * (halves // 2) + round(halves % 2 * rows / 2)
    for epoch in range(halves // 2):
        assert sorted(text for _, text in everything[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert min(source.next_number for source in sources) >= sources[0].end


def test_epochs_have_orders_of_their_own_that_come_back_with_the_seed() -> None:
    first, again = (drawn(make_source(epochs=2)) for _ in range(2))
    assert first == again
    assert [text for _, text in first[:10]] != [text for _, text in first[10:]]
    assert [text for _, text in drawn(make_source(shuffle=False, epochs=1))] == list(range(10))


def test_incomplete_batch_of_all_processes_is_left_out_if_asked() -> None:
    sources = [make_source(11, 2, p, 2, drops_last=True, epochs=2) for p in range(2)]
    assert [len(drawn(source)) for source in sources] == [8, 8]


@pytest.mark.parametrize("workers", [0, 1])
def test_draw_leaves_the_global_source_of_randomness_alone(workers: int) -> None:
    source = make_source(workers=workers)
    torch.manual_seed(3)
    drawn(source, 5)
    numbers = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), numbers)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", range(6))
def test_resume_at_any_place_draws_the_rest(batches: int, workers: int) -> None:
    whole, resumed = make_source(epochs=2, workers=workers), make_source(epochs=2)
    before = drawn(whole, batches)
    resumed.load_state_dict(whole.state_dict())
    assert resumed.next_number == whole.next_number
    rest = drawn(resumed)
    assert rest == drawn(whole)
    assert len(before) + len(rest) == 20


@settings(max_examples=40, deadline=None)
@given(**SIZES, others=st.integers(1, 4), data=st.data())
def test_resume_with_other_processes_draws_what_is_left_once(
    rows: int, batch_size: int, processes: int, others: int, data: st.DataObject
) -> None:
    """The processes stop at different places, even in different epochs; some of their rows are not finished."""
    old = [make_source(rows, batch_size, p, processes, epochs=3) for p in range(processes)]
    done, in_work = [], []
    for source in old:
        taken = [pair for _ in range(data.draw(st.integers(0, 6))) for pair in drawn_once(source)]
        cut = data.draw(st.integers(0, len(taken)))
        done += taken[:cut]
        in_work.append(torch.tensor([number for number, _ in taken[cut:]], dtype=torch.long))
    new = [make_source(rows, batch_size, p, others, epochs=3) for p in range(others)]
    for source in new:
        source.deal_anew([one.state_dict() for one in old], in_work)
    everything = sorted(done + [pair for source in new for pair in drawn(source)])
    assert [number for number, _ in everything] == list(range(3 * rows))
    assert sorted(text for _, text in everything) == sorted(list(range(rows)) * 3)


def drawn_once(source: RowSource) -> list[tuple[int, int]]:
    return [(number, int(row.ids[0])) for number, row in next(source, [])]


def test_resume_with_another_number_of_rows_raises() -> None:
    with pytest.raises(ValueError, match=r"training set with 10 rows, but this one has 9: resume with the same rows"):
        make_source(9).load_state_dict(make_source(10).state_dict())


def test_collator_that_makes_another_number_of_rows_raises() -> None:
    source = make_source(collate_fn=lambda rows: collate(rows[1:]))
    with pytest.raises(ValueError, match=r"`data_collator` made 2 rows of 3.*`rows_on_demand=False`"):
        next(source)


def stream(rows: int = 10, shards: int = 1) -> IterableDataset:
    return Dataset.from_dict({"row": list(range(rows))}).to_iterable_dataset(shards)


@pytest.mark.parametrize(("shards", "workers"), [(1, 0), (2, 0), (3, 0), (4, 2)])
def test_processes_together_draw_every_row_of_a_stream_once_an_epoch(shards: int, workers: int) -> None:
    sources = [make_source(stream(shards=shards), process=p, processes=2, workers=workers) for p in range(2)]
    every = [pair for source in sources for pair in drawn_before(source, 2 * STREAM)]
    assert sorted(text for number, text in every if number < STREAM) == list(range(10))
    assert sorted(text for number, text in every if STREAM <= number < 2 * STREAM) == list(range(10))


def drawn_before(source: RowSource, end: int) -> list[tuple[int, int]]:
    """Rows until the next one has at least a number."""
    pairs: list[tuple[int, int]] = []
    while source.next_number < end:
        pairs += drawn_once(source)
    return pairs


def test_stream_resumed_with_another_batch_size_draws_the_rest() -> None:
    whole, resumed = make_source(stream()), make_source(stream(), batch_size=2)
    drawn(whole, 2)
    resumed.load_state_dict(whole.state_dict())
    assert resumed.next_number == 6
    assert [text for _, text in drawn(resumed, 2)] == [6, 7, 8, 9]


def test_stream_with_other_processes_raises() -> None:
    source = make_source(stream())
    with pytest.raises(ValueError, match="is of 2 processes, each of which read its own part of a stream"):
        source.deal_anew([source.state_dict()] * 2, [])


def test_stream_without_a_row_for_a_process_ends() -> None:
    source = make_source(stream(rows=1), process=1, processes=2)
    assert drawn(source) == []
    assert source.next_number > STREAM
