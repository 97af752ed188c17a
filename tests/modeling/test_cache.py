"""RelayCache: drafts leave nothing behind, and rows come and go together with their state."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from relay_hf import RelayCache

from ..conftest import MASK

LAYERS, PREFIX = 2, 8


def labelled(rows: list[int], *shape: int) -> Tensor:
    """(B, *shape) tensor in which every row holds its own number."""
    numbers = torch.tensor(rows, dtype=torch.float32).reshape(-1, *[1] * len(shape))
    return numbers.expand(-1, *shape).clone()


def cache_of(rows: list[int]) -> RelayCache:
    """A cache of `PREFIX` committed positions whose every tensor says which row it belongs to."""
    cache = RelayCache()
    for layer in range(LAYERS):
        cache.update(labelled(rows, 2, PREFIX, 4), labelled(rows, 2, PREFIX, 4) + 0.5, layer)
    cache.record(labelled(rows, PREFIX), labelled(rows, PREFIX, 6), labelled(rows, PREFIX, 6) + 0.25)
    cache.write_relay_state(labelled(rows, 4, 6))
    return cache


def rows_of(cache: RelayCache) -> list[list[float]]:
    """Which rows each tensor of the cache holds, in order."""
    keys = [layer.keys for layer in cache.layers] + [layer.values - 0.5 for layer in cache.layers]
    states = [cache.tokens, cache.relay_state, cache.last_hidden, cache.last_read_out - 0.25]
    assert all(
        torch.equal(tensor, labelled(tensor.flatten(1)[:, 0].tolist(), *tensor.shape[1:])) for tensor in keys + states
    )
    return [tensor.flatten(1)[:, 0].tolist() for tensor in keys + states]


# -- drafting --------------------------------------------------------------------------------------------------------


def test_drafting_sees_prefix_and_new_positions() -> None:
    cache, new = cache_of([1, 2]), labelled([7, 8], 2, 3, 4)
    with cache.drafting():
        keys, values = cache.update(new, -new, 0)
    assert torch.equal(keys, torch.cat([cache.layers[0].keys, new], dim=-2))
    assert torch.equal(values, torch.cat([cache.layers[0].values, -new], dim=-2))


def test_drafting_in_empty_cache_sees_new_positions_only() -> None:
    cache, new = RelayCache(), labelled([7, 8], 2, 3, 4)
    with cache.drafting():
        assert all(map(torch.equal, cache.update(new, -new, 0), (new, -new)))
    assert cache.get_seq_length() == 0


def test_drafting_model_leaves_nothing_behind(make_model: Callable) -> None:
    model, ids = make_model(open_channel=True, token_shift=True), torch.arange(32).reshape(2, 16)
    cache = model(ids[:, :8], use_cache=True).cache
    kept = [cache.layers[0].keys, cache.layers[1].values, cache.last_hidden, cache.last_read_out]
    copies = [tensor.clone() for tensor in kept]
    with cache.drafting():
        model(ids[:, 8:].clone().fill_(MASK), cache=cache, relay_state=torch.ones(2, 8, 16))
    after = [cache.layers[0].keys, cache.layers[1].values, cache.last_hidden, cache.last_read_out]
    assert all(new is old and torch.equal(new, copy) for new, old, copy in zip(after, kept, copies, strict=True))
    assert cache.relay_state is None
    assert cache.get_seq_length() == 8


def test_drafting_error_inside_ends_it() -> None:
    cache = cache_of([1])
    with pytest.raises(RuntimeError, match="inside"), cache.drafting():
        raise RuntimeError("inside")
    assert not cache.is_drafting


def test_drafting_rows_sees_their_prefix_only() -> None:
    cache, new, rows = cache_of([1, 2, 3]), labelled([7, 8], 2, 3, 4), torch.tensor([0, 2])
    with cache.drafting(rows=rows):
        keys, values = cache.update(new, -new, 0)
        hidden, read_out = cache.outputs_before()
    assert torch.equal(keys, torch.cat([labelled([1, 3], 2, PREFIX, 4), new], dim=-2))
    assert torch.equal(values, torch.cat([labelled([1, 3], 2, PREFIX, 4) + 0.5, -new], dim=-2))
    assert torch.equal(hidden, labelled([1, 3], 1, 6))
    assert torch.equal(read_out, labelled([1, 3], 1, 6) + 0.25)
    assert len(cache.outputs_before()[0]) == 3


def test_drafting_kept_block_is_completed_by_a_part_of_it() -> None:
    cache, whole = cache_of([1, 2, 3]), torch.randn(3, 2, 4, 4)
    with cache.drafting(keep=True):
        cache.update(whole, -whole, 0)
    part, rows, columns = torch.randn(2, 2, 2, 4), torch.tensor([0, 2]), torch.tensor([[0, 1], [2, 3]])
    with cache.drafting(keep=True, rows=rows, columns=columns):
        assert cache.get_mask_sizes(2, 0) == (PREFIX + 4, 0)
        keys, values = cache.update(part, -part, 0)
    expected = whole.clone()
    expected[0, :, :2], expected[2, :, 2:] = part[0], part[1]
    assert torch.equal(keys[:, :, PREFIX:], expected[rows])
    assert torch.equal(values[:, :, PREFIX:], -expected[rows])
    assert torch.equal(cache.block_states[0][0], expected)
    assert torch.equal(cache.block_states[0][1], -expected)
    assert cache.get_mask_sizes(2, 0) == (PREFIX + 2, 0)


def test_committing_stores_first_positions_and_keeps_the_block_behind() -> None:
    cache, new = cache_of([1, 2]), torch.randn(2, 2, 7, 4)
    with cache.committing(3, keep=True):
        keys, _ = cache.update(new, -new, 0)
        cache.record(torch.arange(14).view(2, 7), *torch.arange(84.0).view(2, 2, 7, 3).unbind(0))
    assert torch.equal(keys[:, :, PREFIX:], new)
    assert cache.get_seq_length() == PREFIX + 3
    assert torch.equal(cache.block_states[0][0], new[:, :, 3:])
    assert cache.tokens[:, PREFIX:].tolist() == [[0, 1, 2], [7, 8, 9]]
    assert cache.last_hidden.tolist() == [[[6, 7, 8]], [[27, 28, 29]]]
    assert cache.relay_state is None


# -- the relay state -------------------------------------------------------------------------------------------------


def test_write_relay_state_waiting_row_keeps_its_own() -> None:
    cache = cache_of([1, 2, 3])
    cache.write_relay_state(labelled([7, 9], 4, 6), torch.tensor([0, 2]))
    assert torch.equal(cache.relay_state, labelled([7, 2, 9], 4, 6))


def test_relay_state_of_rows_and_columns() -> None:
    cache, rows, columns = cache_of([1, 2, 3]), torch.tensor([0, 2]), torch.tensor([[0, 1], [2, 3]])
    cache.write_relay_state(labelled([7, 9], 2, 6), rows, columns)
    assert cache.relay_state[..., 0].tolist() == [[7, 7, 1, 1], [2, 2, 2, 2], [3, 3, 9, 9]]
    assert torch.equal(cache.read_relay_state(rows, columns), labelled([7, 9], 2, 6))
    assert cache.read_relay_state(rows)[..., 0].tolist() == [[7, 7, 1, 1], [3, 3, 9, 9]]


def test_write_relay_state_without_channel_stays_none() -> None:
    cache = RelayCache()
    cache.write_relay_state(None)
    assert cache.read_relay_state() is None
    assert cache.relay_state is None


def test_record_keeps_last_position_and_drops_state() -> None:
    cache, hidden = cache_of([1, 2]), torch.randn(2, 4, 6, requires_grad=True)
    cache.record(torch.ones(2, 4), hidden, 2 * hidden)
    assert cache.relay_state is None
    assert torch.equal(cache.last_hidden, hidden[:, -1:])
    assert torch.equal(cache.last_read_out, 2 * hidden[:, -1:])
    assert not cache.last_hidden.requires_grad


# -- rows move together ----------------------------------------------------------------------------------------------


def test_batch_select_indices_all_rows_together() -> None:
    cache = cache_of([1, 2, 3])
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert all(rows == [3, 1] for rows in rows_of(cache))


def test_batch_repeat_interleave_all_rows_together() -> None:
    cache = cache_of([1, 2])
    cache.batch_repeat_interleave(2)
    assert all(rows == [1, 1, 2, 2] for rows in rows_of(cache))


def test_reorder_cache_all_rows_together() -> None:
    cache = cache_of([1, 2, 3])
    cache.reorder_cache(torch.tensor([1, 1, 2]))
    assert all(rows == [2, 2, 3] for rows in rows_of(cache))


def test_reset_forgets_everything() -> None:
    cache = cache_of([1, 2])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.tokens is cache.relay_state is cache.last_hidden is cache.last_read_out is None


def test_crop_forgets_positions_and_what_was_remembered_of_the_last() -> None:
    cache = cache_of([1, 2])
    cache.crop(-3)
    assert cache.get_seq_length() == cache.tokens.shape[1] == PREFIX - 3
    assert cache.relay_state is cache.last_hidden is cache.last_read_out is None


def test_crop_of_nothing_keeps_everything() -> None:
    cache = cache_of([1, 2])
    cache.crop(0)
    assert cache.get_seq_length() == PREFIX
    assert all(rows == [1, 2] for rows in rows_of(cache))


def test_crop_positive_number_raises() -> None:
    with pytest.raises(ValueError, match="positive value"):
        cache_of([1]).crop(3)


def test_rows_of_cache_without_keys_move_all_the_same() -> None:
    """Short prompts are denoised before anything is committed."""
    cache = RelayCache()
    cache.write_relay_state(labelled([1, 2], 4, 6))
    cache.batch_select_indices(torch.tensor([1]))
    assert torch.equal(cache.relay_state, labelled([2], 4, 6))


@given(st.data())
def test_any_sequence_of_row_operations_equals_list(data: st.DataObject) -> None:
    rows = list(range(1, data.draw(st.integers(1, 4), "rows") + 1))
    cache = cache_of(rows)
    for operation in data.draw(st.lists(st.sampled_from(["select", "repeat", "reorder"]), max_size=5), "operations"):
        if operation == "repeat":
            times = data.draw(st.integers(1, 2), "times")
            cache.batch_repeat_interleave(times)
            rows = [row for row in rows for _ in range(times)]
        else:
            chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4), "chosen")
            move = cache.batch_select_indices if operation == "select" else cache.reorder_cache
            move(torch.tensor(chosen))
            rows = [rows[index] for index in chosen]
        assert all(found == rows for found in rows_of(cache))


def test_token_shift_model_cropped_cache_raises(make_model: Callable) -> None:
    model, ids = make_model(token_shift=True), torch.arange(16)[None]
    cache = model(ids, use_cache=True).cache
    cache.crop(-8)
    with pytest.raises(ValueError, match=r"not the hidden state at its end.*commit a block"):
        model(ids[:, :8], cache=cache)
