"""RelayCache: forwards leave committed text as it was, and rows come and go together with their state."""

import copy
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
    prefix = cache.prefix()
    for layer in range(LAYERS):
        prefix.update(labelled(rows, 2, PREFIX, 4), labelled(rows, 2, PREFIX, 4) + 0.5, layer)
    prefix.take(labelled(rows, PREFIX, 6), labelled(rows, PREFIX, 6) + 0.25)
    cache.commit(prefix, labelled(rows, PREFIX))
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


# -- a prefix ---------------------------------------------------------------------------------------------------------


def test_prefix_sees_committed_and_new_positions() -> None:
    cache, new = cache_of([1, 2]), labelled([7, 8], 2, 3, 4)
    keys, values = cache.prefix().update(new, -new, 0)
    assert torch.equal(keys, torch.cat([cache.layers[0].keys, new], dim=-2))
    assert torch.equal(values, torch.cat([cache.layers[0].values, -new], dim=-2))
    assert cache.get_seq_length() == PREFIX


def test_prefix_of_empty_cache_sees_new_positions_only() -> None:
    cache, new = RelayCache(), labelled([7, 8], 2, 3, 4)
    assert all(map(torch.equal, cache.prefix().update(new, -new, 0), (new, -new)))
    assert cache.get_seq_length() == 0


def test_prefix_forward_leaves_committed_text_as_it_was(make_model: Callable) -> None:
    model, ids = make_model(open_channel=True, token_shift=True), torch.arange(32).reshape(2, 16)
    cache = model(ids[:, :8], use_cache=True).cache
    copies = [tensor.clone() for tensor in (cache.layers[0].keys, cache.layers[1].values)]
    tail = (cache.last_hidden, cache.last_read_out, cache.tokens)
    model(ids[:, 8:].clone().fill_(MASK), cache=cache.prefix(), relay_state=torch.ones(2, 8, 16))
    assert all(map(torch.equal, (cache.layers[0].keys, cache.layers[1].values), copies))
    assert all(map(torch.equal, (cache.last_hidden, cache.last_read_out, cache.tokens), tail))
    assert cache.relay_state is None
    assert cache.get_seq_length() == 8


def test_prefix_of_rows_sees_their_text_only() -> None:
    cache, new, rows = cache_of([1, 2, 3]), labelled([7, 8], 2, 3, 4), torch.tensor([0, 2])
    prefix = cache.prefix(rows)
    keys, values = prefix.update(new, -new, 0)
    assert torch.equal(keys, torch.cat([labelled([1, 3], 2, PREFIX, 4), new], dim=-2))
    assert torch.equal(values, torch.cat([labelled([1, 3], 2, PREFIX, 4) + 0.5, -new], dim=-2))
    assert torch.equal(prefix.before, labelled([1, 3], 1, 6))
    assert torch.equal(prefix.read_out_before, labelled([1, 3], 1, 6) + 0.25)
    assert len(cache.prefix().before) == 3


def test_prefix_of_a_part_sees_the_rest_as_an_earlier_forward_left_it() -> None:
    cache, whole = cache_of([1, 2, 3]), torch.randn(3, 2, 4, 4)
    cache.prefix().update(whole, -whole, 0)
    part, rows, places = torch.randn(2, 2, 2, 4), torch.tensor([0, 2]), torch.tensor([[0, 1], [2, 3]])
    prefix = cache.prefix(rows, places, width=4)
    assert prefix.get_mask_sizes(2, 0) == (PREFIX + 4, 0)
    keys, values = prefix.update(part, -part, 0)
    expected = whole.clone()
    expected[0, :, :2], expected[2, :, 2:] = part[0], part[1]
    assert torch.equal(keys[:, :, PREFIX:], expected[rows])
    assert torch.equal(values[:, :, PREFIX:], -expected[rows])
    again = torch.randn(3, 2, 1, 4)
    keys, _ = cache.prefix(None, torch.zeros(3, 1, dtype=torch.long), width=4).update(again, again, 0)
    assert torch.equal(keys[:, :, PREFIX:], torch.cat([again, expected[:, :, 1:]], dim=2))
    assert cache.prefix().get_mask_sizes(2, 0) == (PREFIX + 2, 0)


def test_shared_prefix_serves_any_number_of_rows_and_leaves_nothing() -> None:
    cache, new = cache_of([5]), torch.randn(3, 2, 4, 4)
    held = cache.layers[0].memory
    keys, values = cache.shared_prefix().update(new, -new, 0)
    assert torch.equal(keys, torch.cat([labelled([5, 5, 5], 2, PREFIX, 4), new], dim=2))
    assert torch.equal(values[:, :, PREFIX:], -new)
    assert cache.layers[0].memory is held


def test_shared_prefix_of_chosen_rows_repeats_their_texts_and_tails() -> None:
    cache, new = cache_of([5, 6, 7]), torch.randn(3, 2, 4, 4)
    cache.last_hidden = torch.tensor([5.0, 6.0, 7.0])[:, None, None]
    for rows, seen in (([2, 0, 2], [7, 5, 7]), ([1], [6, 6, 6])):
        prefix = cache.shared_prefix(torch.tensor(rows))
        keys, _ = prefix.update(new, -new, 0)
        assert torch.equal(keys, torch.cat([labelled(seen, 2, PREFIX, 4), new], dim=2))
        assert prefix.before.flatten().tolist() == seen[: len(rows)]


def test_commit_moves_the_length_over_what_the_forward_wrote() -> None:
    cache, new = cache_of([1, 2]), torch.randn(2, 2, 7, 4)
    prefix = cache.prefix()
    for layer in range(LAYERS):
        prefix.update(new, -new, layer)
    prefix.take(*torch.arange(84.0).view(2, 2, 7, 3).unbind(0))
    cache.commit(prefix, torch.arange(14).view(2, 7)[:, :3])
    assert cache.get_seq_length() == PREFIX + 3
    assert torch.equal(cache.layers[1].keys[:, :, PREFIX:], new[:, :, :3])
    assert cache.tokens[:, PREFIX:].tolist() == [[0, 1, 2], [7, 8, 9]]
    assert cache.last_hidden.tolist() == [[[6, 7, 8]], [[27, 28, 29]]]
    assert cache.relay_state is None
    # The block behind is kept, as a forward over a part of it sees it.
    one = torch.randn(2, 2, 1, 4)
    keys, _ = cache.prefix(None, torch.zeros(2, 1, dtype=torch.long), width=4).update(one, one, 0)
    assert torch.equal(keys[:, :, PREFIX + 4 :], new[:, :, 4:])


# -- memory ------------------------------------------------------------------------------------------------------------


def test_reserved_memory_is_taken_once_and_written_in_place(make_model: Callable) -> None:
    model, ids = make_model(token_shift=True), torch.arange(48).reshape(2, 24)
    cache = RelayCache(config=model.config.text_config)
    cache.reserve(24)
    places = set()
    with torch.no_grad():
        for begin in (0, 8, 16):
            model(ids[:, begin : begin + 8], cache=cache.prefix())
            model(ids[:, begin : begin + 8], cache=cache)
            places.add(tuple(held.data_ptr() for layer in cache.layers for held in layer.memory))
    assert len(places) == 1
    assert cache.layers[0].memory[0].shape[2] == 24
    with torch.no_grad():
        whole = model(ids, use_cache=True).cache
    torch.testing.assert_close(cache.layers[1].keys, whole.layers[1].keys, rtol=0, atol=1e-5)


def test_memory_that_nobody_reserved_grows_by_half(make_model: Callable) -> None:
    cache, new = cache_of([1]), labelled([1], 2, 1, 4)
    takings = set()
    for _ in range(60):
        cache.layers[0].update(new, new)
        takings.add(cache.layers[0].memory[0].data_ptr())
    assert len(takings) <= 8
    assert torch.equal(cache.layers[0].keys, labelled([1], 2, PREFIX + 60, 4))


def test_committed_numbers_are_never_written_again() -> None:
    """Not even those that a crop forgets: a conversation may have to be put back."""
    cache = cache_of([1])
    keys = cache.layers[0].keys
    kept = keys.clone()
    cache.crop(-4)
    new = labelled([9], 2, 6, 4)
    cache.layers[0].update(new, new)
    assert torch.equal(keys, kept)
    assert torch.equal(cache.layers[0].keys, torch.cat([kept[:, :, : PREFIX - 4], new], dim=2))


def test_copy_of_a_cache_is_independent() -> None:
    cache = cache_of([1])
    other, new = copy.deepcopy(cache), labelled([9], 2, 4, 4)
    for layer in other.layers:
        layer.update(new, new)
    assert cache.get_seq_length() == PREFIX
    assert all(rows == [1] for rows in rows_of(cache))


def test_gradient_flows_through_cached_keys(make_model: Callable) -> None:
    """As through the same text without a cache."""
    model, ids = make_model(), torch.arange(16)[None]
    gradients = []
    for cached in (False, True):
        model.zero_grad()
        if cached:
            cache = RelayCache(config=model.config.text_config)
            model(ids[:, :8], cache=cache)
            logits = model(ids[:, 8:], cache=cache).logits
        else:
            logits = model(ids).logits[:, 8:]
        logits.square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_autocast_in_one_forward_leaves_committed_numbers_alone(make_model: Callable) -> None:
    model, ids = make_model(), torch.arange(24)[None]
    cache = RelayCache(config=model.config.text_config)
    with torch.no_grad():
        model(ids[:, :8], cache=cache)
        kept = cache.layers[0].values.clone()
        with torch.autocast("cpu", torch.bfloat16):
            model(ids[:, 8:16], cache=cache.prefix())
        assert torch.equal(cache.layers[0].values, kept)
        model(ids[:, 8:16], cache=cache.prefix())


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_generate_in_another_mode_goes_on_with_the_cache(make_model: Callable, mode: Callable) -> None:
    model, ids = make_model(token_shift=True), torch.arange(1, 14)[None]
    with mode():
        first = model.generate(ids, max_new_tokens=8, eos_token_id=None, return_dict_in_generate=True)
    longer = torch.cat([first.sequences.clone(), ids], dim=1)
    with_cache = model.generate(longer, max_new_tokens=8, eos_token_id=None, cache=first.cache)
    assert with_cache.shape == (1, longer.shape[1] + 8)


def test_forward_without_gradient_spares_the_graph_of_an_earlier_one(make_model: Callable) -> None:
    model, ids = make_model(), torch.arange(24)[None]
    cache = RelayCache(config=model.config.text_config)
    with torch.no_grad():
        model(ids[:, :8], cache=cache)
    output = model(ids[:, 8:16], cache=cache.prefix())
    with torch.no_grad():
        model(ids[:, 16:], cache=cache.prefix())
    output.logits.sum().backward()
    assert model.lm_head.weight.grad.isfinite().all()


def test_generate_gives_spare_memory_back(make_model: Callable) -> None:
    model = make_model()
    output = model.generate(
        torch.arange(1, 12)[None], max_new_tokens=400, eos_token_id=list(range(63)), pad_token_id=0,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert output.cache.layers[0].memory[0].shape[2] == output.cache.get_seq_length() == 8


def test_reserve_reaches_layers_that_are_still_to_come(make_model: Callable) -> None:
    cache = RelayCache()
    cache.reserve(40)
    with torch.no_grad():
        make_model()(torch.arange(8)[None], cache=cache)
    assert cache.layers[1].memory[0].shape[2] == 40


def test_forward_over_other_rows_raises(make_model: Callable) -> None:
    model, ids = make_model(), torch.arange(16).view(2, 8)
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match=r"runs 1 row\(s\), but the cache holds 2.*shared_prefix"):
        model(ids[:1], cache=cache)


def test_commit_of_a_forward_that_was_not_the_last_raises(make_model: Callable) -> None:
    model, ids = make_model(), torch.arange(24)[None]
    cache = model(ids[:, :8], use_cache=True).cache
    prefix = cache.prefix()
    with pytest.raises(ValueError, match=r"takes the prefix of the cache's last forward"):
        cache.commit(prefix, ids[:, 8:16])  # it did not run
    model(ids[:, 8:16], cache=prefix)
    model(ids[:, 16:], cache=cache.prefix())
    with pytest.raises(ValueError, match=r"takes the prefix of the cache's last forward"):
        cache.commit(prefix, ids[:, 8:16])
    with pytest.raises(ValueError, match=r"takes the prefix of the cache's last forward"):
        cache.commit(cache.shared_prefix(), ids[:, 8:16])
    assert cache.get_seq_length() == 8


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


def test_commit_keeps_last_position_and_drops_state() -> None:
    cache, hidden = cache_of([1, 2]), torch.randn(2, 4, 6, requires_grad=True)
    prefix = cache.prefix()
    for layer in range(LAYERS):
        prefix.update(labelled([1, 2], 2, 4, 4), labelled([1, 2], 2, 4, 4), layer)
    prefix.take(hidden, 2 * hidden)
    cache.commit(prefix, torch.ones(2, 4))
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
