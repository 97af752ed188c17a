"""Positions, the block-causal pattern and the token shift; and that a cached prefix changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from relay_hf import RelayCache, RelayForMaskedDiffusion
from relay_hf.modeling.attention_relay import align_to_positions, block_attention_mask, new_positions, positions_of
from relay_hf.modeling.cache_relay import prefix_of

from ..conftest import MASK

BLOCK = 4
PADDINGS = {
    "none": [[1] * 12, [1] * 12],
    "left": [[0] * 5 + [1] * 7, [1] * 12],
    "right": [[1] * 7 + [0] * 5, [1] * 11 + [0]],
    "both": [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0], [0] + [1] * 11],
}


def brute_force_pattern(is_text: list[list[int]], new: int, block_size: int | None) -> list[list[list[bool]]]:
    """What the last `new` columns see: text of their own block and of every block before it."""
    pattern = []
    for row in is_text:
        position = [sum(row[:column]) for column in range(len(row))]
        block = [p // block_size if block_size else 0 for p in position]
        pattern.append(
            [[bool(row[k]) and block[k] <= block[q] for k in range(len(row))] for q in range(len(row))][-new:]
        )
    return pattern


def pattern_of(model: RelayForMaskedDiffusion, mask: Tensor | None, cached: int, new: int, block: int | None) -> Tensor:
    """(B, new, K) bool that `block_attention_mask` gives behind `cached` positions."""
    cache = RelayCache(config=model.config.text_config)
    if cached:
        keys = torch.zeros(2, 2, cached, 4)
        cache.update(keys, keys, 0)
    result = block_attention_mask(model.model.config, torch.zeros(2, new, 16), mask, prefix_of(cache), block)
    if result is None:  # full attention
        return torch.ones(2, new, cached + new, dtype=torch.bool)
    return (result if result.dtype == torch.bool else result == 0)[:, 0].expand(2, -1, -1)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("cached", [0, 4, 8])
@pytest.mark.parametrize("block", [1, 3, BLOCK, 12, None])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_block_attention_mask_equals_brute_force(
    make_model: Callable, padding: str, cached: int, block: int | None, attention: str
) -> None:
    model = make_model()
    model.set_attn_implementation(attention)
    is_text = torch.tensor(PADDINGS[padding])
    ours = pattern_of(model, is_text, cached, 12 - cached, block)
    expected = torch.tensor(brute_force_pattern(PADDINGS[padding], 12 - cached, block))
    # What padding looks at is of no interest to anyone.
    rows = is_text[:, cached:].bool()
    assert ours[rows].equal(expected[rows])


@pytest.mark.parametrize("cached", [0, 4, 8])
@pytest.mark.parametrize("block", [1, BLOCK, 12, None])
def test_block_attention_mask_no_mask_equals_mask_of_ones(make_model: Callable, cached: int, block: int | None) -> None:
    model, new = make_model(), 12 - cached
    model.set_attn_implementation("sdpa")
    with_ones = pattern_of(model, torch.ones(2, 12, dtype=torch.long), cached, new, block)
    assert pattern_of(model, None, cached, new, block).equal(with_ones)


def test_block_attention_mask_prepared_mask_returned_as_it_is(make_model: Callable) -> None:
    prepared = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    result = block_attention_mask(make_model().model.config, torch.zeros(2, 3, 16), prepared, prefix_of(None), 2)
    assert result is prepared


def test_forward_later_block_invisible_own_block_visible(make_model: Callable) -> None:
    model, ids = make_model(block_size=BLOCK), torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits
        after = model(ids.index_fill(1, torch.tensor([7]), 50)).logits
    changed = (before != after).any(-1)[0]
    assert changed.tolist() == [False] * 4 + [True] * 8


@pytest.mark.parametrize("boolean", [False, True])
def test_positions_of_padding_on_any_side(boolean: bool) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    positions = positions_of(mask.bool() if boolean else mask)
    assert positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


def test_new_positions_behind_cache_counted_from_its_end() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert new_positions(None, 3, 2, mask.device).tolist() == [[3, 4]]
    assert new_positions(mask, 3, 2, mask.device).tolist() == [[1, 2], [3, 3]]


def test_align_to_positions_takes_output_of_position_before() -> None:
    raw, before = torch.arange(4.0)[None, :, None], torch.tensor([[[9.0]]])
    assert align_to_positions(raw, torch.arange(4)[None]).flatten().tolist() == [0, 0, 1, 2]
    assert align_to_positions(raw, torch.arange(4, 8)[None], before).flatten().tolist() == [9, 0, 1, 2]
    assert align_to_positions(raw, torch.tensor([[0, 0, 1, 2]]), before).flatten().tolist() == [0, 1, 1, 2]


# -- a cached prefix changes nothing ---------------------------------------------------------------------------------

READ_OUTS: dict[str, dict[str, Any]] = {
    "post_norm": {"relay_readout": "post_norm"},
    "pre_norm": {"relay_readout": "pre_norm"},
    "inner": {"relay_readout": "pre_norm", "relay_layer": 0},
}
# The second row starts a block later and ends in padding, as rows of a ragged batch do.
RAGGED = torch.tensor([[1] * 12, [0] * 4 + [1] * 7 + [0]])


def block_by_block(model: RelayForMaskedDiffusion, ids: Tensor, mask: Tensor | None, state: Tensor) -> list[Tensor]:
    """Logits and states of committing the first two blocks and drafting the third."""
    cache, outputs = RelayCache(config=model.config.text_config), []
    for begin in range(0, 12, BLOCK):
        seen = None if mask is None else mask[:, : begin + BLOCK]
        new = {"relay_state": state[:, begin:], "cache": cache.prefix()} if begin == 8 else {"cache": cache}
        outputs.append(model(ids[:, begin : begin + BLOCK], attention_mask=seen, **new))
    return [torch.cat([getattr(o, name) for o in outputs], dim=1) for name in ("logits", "relay_state")]


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("read_out", READ_OUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("ragged", [False, True])
def test_forward_cached_equals_uncached(
    make_model: Callable, token_shift: bool, read_out: str, attention: str, ragged: bool
) -> None:
    model = make_model(block_size=BLOCK, token_shift=token_shift, open_channel=True, **READ_OUTS[read_out])
    model.set_attn_implementation(attention)
    ids = torch.arange(24).reshape(2, 12).index_fill(1, torch.tensor([9, 10]), MASK)
    mask, state = RAGGED if ragged else None, torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model(ids, attention_mask=mask, relay_state=state)
        cached = block_by_block(model, ids, mask, state)
    rows = RAGGED.bool() if ragged else torch.ones(2, 12, dtype=torch.bool)
    # Sums over another number of columns round differently, and on some processors by up to 1.1e-5 of logits up to 5.
    torch.testing.assert_close(cached[0][rows], full.logits[rows], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(cached[1][rows], full.relay_state[rows], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [BLOCK, None])
def test_forward_eager_equals_sdpa(make_model: Callable, block: int | None) -> None:
    model, ids, real = make_model(block_size=block, token_shift=True), torch.arange(24).reshape(2, 12), RAGGED.bool()
    with torch.no_grad():
        sdpa = model(ids, attention_mask=RAGGED)
        model.set_attn_implementation("eager")
        eager = model(ids, attention_mask=RAGGED)
    torch.testing.assert_close(eager.logits[real], sdpa.logits[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_padding_changes_nothing(make_model: Callable, side: str) -> None:
    model, ids = make_model(block_size=BLOCK, token_shift=True).double(), torch.arange(7)[None] + 1
    empty = torch.zeros(1, 5, dtype=torch.long)
    order = [empty, ids] if side == "left" else [ids, empty]
    padded, mask = torch.cat(order, 1), torch.cat([torch.ones_like(t) if t is ids else t for t in order], 1)
    with torch.no_grad():
        ours, alone = model(padded, attention_mask=mask), model(ids)
    torch.testing.assert_close(ours.logits[mask.bool()], alone.logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.relay_state[mask.bool()], alone.relay_state[0], atol=1e-5, rtol=1e-5)
