"""The bound against an enumeration of all masks, each scored by full forwards without any cache."""

from collections import Counter
from collections.abc import Callable
from itertools import combinations, product
from math import comb, sqrt
from typing import Any

import pytest
import torch

from relay_hf import RelayForMaskedDiffusion
from relay_hf.evaluation import LikelihoodBound
from relay_hf.evaluation import likelihood as likelihood_module
from relay_hf.evaluation.likelihood import draw_masks
from tests.conftest import MASK, VOCAB_SIZE

SHIFTS = pytest.mark.parametrize("token_shift", [False, True])
BLOCKS = pytest.mark.parametrize("block_size", [8, None])
CHANNELS = pytest.mark.parametrize(
    "channel",
    [
        {"relay_channel": "none"},
        {"open_channel": True},
        {"open_channel": True, "relay_initial_state": "none", "relay_scope": "all", "relay_readout": "pre_norm"},
    ],
    ids=["none", "open", "all_pre_norm"],
)
# 11 tokens: the second block holds three of them, so that a continuation starts within it.
CONTEXT = [5, 9, 12, 7, 33, 2, 41, 18, 6, 50, 3]


def bound(model: RelayForMaskedDiffusion, context: list[int], continuation: list[int], **options: Any) -> float:
    ((_, value),) = LikelihoodBound(model, **options)([(context, continuation)])
    return value


@torch.no_grad()
def block_log_probabilities(
    model: RelayForMaskedDiffusion, prefix: list[int], block: list[int], hidden: tuple[int, ...], passes: int
) -> torch.Tensor:
    """(len(hidden), V) log-probabilities at the `hidden` columns of `block`, from whole sequences."""
    noisy = [MASK if column in hidden else token for column, token in enumerate(block)]
    ids = torch.tensor([[*prefix, *noisy]])
    in_block = (torch.arange(ids.shape[1]) >= len(prefix))[None]
    state = model.initial_relay_state(*ids.shape) if passes == 2 else None
    for number in range(passes):
        # The clean prefix is never injected.
        receives = model.receives_state(ids) & in_block
        output = model(ids, relay_state=state, relay_mask=receives if state is not None else None)
        state = output.relay_state if number == 0 else None
    logits = output.logits[0, [len(prefix) + column for column in hidden]]
    logits[:, MASK] = -torch.inf
    return logits.log_softmax(-1)


def enumerated(model: RelayForMaskedDiffusion, context: list[int], continuation: list[int]) -> tuple[float, float]:
    """Exact bound of a continuation within one block, and the variance of one sample of it."""
    size = model.config.block_size or len(context) + len(continuation)
    begin = len(context) // size * size if model.config.block_size else 0
    block = [*context[begin:], *continuation]
    block += [MASK] * (size - len(block))
    scored = range(len(context) - begin, len(context) - begin + len(continuation))
    passes = 1 if model.config.relay_channel == "none" else 2
    mean = square = 0.0
    for count in range(1, len(scored) + 1):
        for hidden in combinations(scored, count):
            scores = block_log_probabilities(model, context[:begin], block, hidden, passes)
            value = sum(float(scores[i, block[column]]) for i, column in enumerate(hidden)) * len(scored) / count
            probability = 1 / len(scored) / comb(len(scored), count)
            mean, square = mean + probability * value, square + probability * value**2
    return mean, square - mean**2


@SHIFTS
@BLOCKS
@CHANNELS
@pytest.mark.parametrize("start", [8, 10], ids=["block_start", "mid_block"])
def test_bound_within_standard_errors_of_enumeration(
    make_model: Callable[..., RelayForMaskedDiffusion],
    token_shift: bool,
    block_size: int | None,
    channel: Any,
    start: int,
) -> None:
    model = make_model(token_shift=token_shift, block_size=block_size, **channel)
    context, continuation = CONTEXT[:start], [11, 29, 4, 60]
    mean, variance = enumerated(model, context, continuation)
    samples = 4000
    error = sqrt(variance / samples)  # sizes are drawn evenly, so the true error is smaller
    assert variance > 0.1
    assert bound(model, context, continuation, samples=samples) == pytest.approx(mean, abs=5 * error)


def test_bound_averaged_over_seeds_is_unbiased_with_few_samples(
    make_model: Callable[..., RelayForMaskedDiffusion],
) -> None:
    """Three samples for four sizes: no run sees them all."""
    model = make_model(token_shift=True)
    mean, variance = enumerated(model, CONTEXT, [11, 29, 4, 60])
    values = [bound(model, CONTEXT, [11, 29, 4, 60], samples=3, seed=seed) for seed in range(300)]
    assert sum(values) / 300 == pytest.approx(mean, abs=5 * sqrt(variance / 900))


@SHIFTS
@CHANNELS
def test_bound_over_several_blocks_is_sum_over_blocks(
    make_model: Callable[..., RelayForMaskedDiffusion], token_shift: bool, channel: Any
) -> None:
    model = make_model(token_shift=token_shift, **channel)
    continuation = [11, 29, 4, 60, 1, 22, 13, 54, 35, 16, 47, 58, 49, 10, 31]  # 5 in one block, 8, 2
    parts = [continuation[:5], continuation[5:13], continuation[13:]]
    together = bound(model, CONTEXT, continuation, samples=4000)
    total, variance, context = 0.0, 0.0, CONTEXT
    for part in parts:
        mean, spread = enumerated(model, context, part)
        total, variance, context = total + mean, variance + spread, context + part
    assert together == pytest.approx(total, abs=5 * sqrt(variance / 4000))


@SHIFTS
@BLOCKS
@CHANNELS
def test_bound_of_one_token_is_exact_and_normalised(
    make_model: Callable[..., RelayForMaskedDiffusion], token_shift: bool, block_size: int | None, channel: Any
) -> None:
    model = make_model(token_shift=token_shift, block_size=block_size, **channel)
    exact = [enumerated(model, CONTEXT, [token])[0] for token in (0, 17, 62)]
    values = [value for _, value in LikelihoodBound(model, samples=3)([(CONTEXT, [t]) for t in range(VOCAB_SIZE)])]
    assert [values[token] for token in (0, 17, 62)] == pytest.approx(exact, abs=1e-5)
    assert values == [value for _, value in LikelihoodBound(model, seed=9)([(CONTEXT, [t]) for t in range(VOCAB_SIZE)])]
    assert values[MASK] == -torch.inf
    assert torch.tensor(values).exp().sum().item() == pytest.approx(1.0, abs=1e-5)


@SHIFTS
@BLOCKS
def test_bound_is_independent_of_other_requests_and_their_order(
    make_model: Callable[..., RelayForMaskedDiffusion], token_shift: bool, block_size: int | None
) -> None:
    model = make_model(token_shift=token_shift, block_size=block_size, open_channel=True)
    requests = [
        (CONTEXT, [11, 29, 4]), (CONTEXT[:8], list(range(20))), (CONTEXT[:3], [4]), (CONTEXT, [11, 29, 5]),
        (CONTEXT[:8], list(range(1, 12))), ([7], [8, 9]), (CONTEXT, []),
    ]  # fmt: skip
    estimate = LikelihoodBound(model, samples=6, batch_size=1)
    alone = [next(estimate([request]))[1] for request in requests]
    assert [value for _, value in sorted(estimate(requests))] == alone
    assert [value for _, value in sorted(estimate(requests[::-1]))] == alone[::-1]
    assert alone[-1] == 0.0


def requests_of_few_shapes() -> list[tuple[list[int], list[int]]]:
    """Choices behind equal and different contexts, in one block and across blocks; some have no number to run for."""
    contexts = [CONTEXT, [*CONTEXT[:3], *CONTEXT[:8]], CONTEXT[:8], CONTEXT[:3], []]
    continuations = [[11, 29, 4], [11, 5], list(range(20)), [3, MASK], [], [7]]
    return [(context, continuation) for continuation in continuations for context in contexts]


@SHIFTS
@BLOCKS
@CHANNELS
@pytest.mark.parametrize("positions", [2**16, 100, 1])
def test_bound_in_batches_equals_one_at_a_time(
    make_model: Callable[..., RelayForMaskedDiffusion],
    token_shift: bool,
    block_size: int | None,
    channel: Any,
    positions: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, requests = make_model(token_shift=token_shift, block_size=block_size, **channel), requests_of_few_shapes()
    alone = [value for _, value in sorted(LikelihoodBound(model, samples=6, batch_size=1)(requests))]
    monkeypatch.setattr(likelihood_module, "POSITIONS_AT_ONCE", positions)
    for size in (None, 3):
        found = dict(LikelihoodBound(model, samples=6, batch_size=size)(requests))
        assert [found[index] for index in range(len(requests))] == pytest.approx(alone, rel=1e-5)


def test_bound_of_requests_of_one_shape_takes_one_forward_per_pass_and_commit(
    make_model: Callable[..., RelayForMaskedDiffusion],
) -> None:
    """Four requests behind two contexts, over two blocks: one prefill, one commit, two passes a block."""
    model = make_model(token_shift=True, open_channel=True)
    contexts = [CONTEXT, [*CONTEXT[:3], *CONTEXT[:8]]]
    requests = [(context, list(range(first, first + 9))) for first in (0, 20) for context in contexts]
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    list(LikelihoodBound(model, samples=6)(requests))
    assert (rows[0], rows[3], len(rows)) == (2, 4, 6)
    rows.clear()
    list(LikelihoodBound(model, samples=6, batch_size=1)(requests))
    assert len(rows) == 2 + 4 * 5  # choices behind one context share its prefill


def test_bound_yields_the_longest_requests_first(make_model: Callable[..., RelayForMaskedDiffusion]) -> None:
    requests = [([1] * length, [2]) for length in (3, 30, 12)]
    assert [index for index, _ in LikelihoodBound(make_model())(requests)] == [1, 2, 0]


def test_bound_depends_on_seed_and_samples(make_model: Callable[..., RelayForMaskedDiffusion]) -> None:
    values = [bound(make_model(), CONTEXT, [11, 29, 4, 60], **o) for o in ({}, {"seed": 1}, {"samples": 31})]
    assert len(set(values)) == 3


@SHIFTS
def test_bound_with_channel_uses_the_state_of_a_first_pass(
    make_model: Callable[..., RelayForMaskedDiffusion], token_shift: bool
) -> None:
    model = make_model(token_shift=token_shift, open_channel=True)
    assert bound(model, CONTEXT, [4]) != pytest.approx(bound(model, CONTEXT, [4], use_relay=False), abs=1e-3)
    ignored = make_model(token_shift=token_shift)  # a fresh channel adds exactly nothing
    assert bound(ignored, CONTEXT, [4]) == bound(ignored, CONTEXT, [4], use_relay=False)


def test_bound_in_small_pieces_is_the_same(
    make_model: Callable[..., RelayForMaskedDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(open_channel=True)
    whole = bound(model, CONTEXT, [11, 29, 4, 60])
    monkeypatch.setattr(likelihood_module, "LOGITS_AT_ONCE", 1)
    assert bound(model, CONTEXT, [11, 29, 4, 60]) == pytest.approx(whole, abs=1e-4)


def test_masks_of_every_size_come_up_equally_often_and_weights_average_to_one() -> None:
    masks, weights = draw_masks(5, 1000, torch.Generator().manual_seed(0))
    assert len(masks) == 2**5 - 1
    drawn = weights * masks.sum(-1) / 5  # the share of the samples
    assert [drawn[masks.sum(-1) == size].sum().item() for size in range(1, 6)] == pytest.approx([0.2] * 5, abs=1e-3)
    # L / l * l scored positions: each counts once on average.
    assert (weights[:, None] * masks).sum().item() == pytest.approx(5.0)


@pytest.mark.parametrize("length", [4, 6, 8])
def test_masks_of_one_turn_are_all_different_and_hide_each_position_equally_often(length: int) -> None:
    masks, weights = draw_masks(length, length**2, torch.Generator().manual_seed(0))
    assert len(masks) == length * (length - 1) + 1  # all positions at once can be hidden in one way only
    for size in range(1, length + 1):
        hidden = masks[masks.sum(-1) == size]
        assert hidden.sum(0).tolist() == [len(hidden) * size // length] * length
    assert weights.max() == pytest.approx(1 / length)


def test_masks_of_few_samples_are_uniform_subsets() -> None:
    """Averaged over many draws of 5 for 4 positions, all 15 subsets have their probability 1 / 4 / (4 over l)."""
    counts: Counter = Counter()
    for seed in range(4000):
        masks, weights = draw_masks(4, 5, torch.Generator().manual_seed(seed))
        for mask, weight in zip(masks.tolist(), weights.tolist(), strict=True):
            counts[tuple(mask)] += weight * sum(mask) / 4
    for mask in product([False, True], repeat=4):
        probability = 1 / 4 / comb(4, sum(mask)) if any(mask) else 0.0
        error = sqrt(probability * (1 - probability) / 20000)
        assert counts[mask] / 4000 == pytest.approx(probability, abs=5 * error)


def test_context_with_mask_token_raises(make_model: Callable[..., RelayForMaskedDiffusion]) -> None:
    with pytest.raises(ValueError, match=r"context holds \[MASK\]"):
        bound(make_model(), [1, MASK], [2])


def test_no_samples_or_no_batch_raises(make_model: Callable[..., RelayForMaskedDiffusion]) -> None:
    with pytest.raises(ValueError, match="`samples=0` draws no mask"):
        LikelihoodBound(make_model(), samples=0)
    with pytest.raises(ValueError, match="`batch_size=0` runs no request"):
        LikelihoodBound(make_model(), batch_size=0)
