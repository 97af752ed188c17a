import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from relay_hf.modeling import head_relay
from relay_hf.modeling.head_relay import (
    best_token,
    best_tokens,
    deciding_logits,
    multiplies_into_single,
    score_positions,
)


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, mask: int, z_loss: float) -> tuple:
    logits = hidden @ weight.T
    losses = F.cross_entropy(logits, targets, reduction="none") + z_loss * logits.logsumexp(-1) ** 2
    return losses, best_token(logits.detach().clone(), mask)[0]


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 20),
    vocab=st.integers(2, 30),
    tile=st.integers(1, 200),
    z_loss=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 1000),
)
def test_score_positions_any_tile_equals_full_logits(
    count: int, vocab: int, tile: int, z_loss: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(count, 5, generator=generator), torch.randn(vocab, 5, generator=generator)]
    targets = torch.randint(0, vocab, (count,), generator=generator)
    slope = torch.randn(count, generator=generator)
    results = []
    for function in (plain, score_positions):
        hidden, weight = (leaf.clone().requires_grad_() for leaf in leaves)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(head_relay.TILE_NUMBERS, "cpu", tile)
            losses, confidence = function(hidden, weight, targets, vocab - 1, z_loss)
            (losses * slope).sum().backward()
        results.append((losses, confidence, hidden.grad, weight.grad))
    for expected, given_ in zip(*results, strict=True):
        torch.testing.assert_close(given_, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 20), vocab=st.integers(2, 30), tile=st.integers(1, 200), seed=st.integers(0, 1000))
def test_best_tokens_any_tile_equals_full_logits(count: int, vocab: int, tile: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(count, 5, generator=generator), torch.randn(vocab, 5, generator=generator)
    mask = seed % vocab
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(head_relay.TILE_NUMBERS, "cpu", tile)
        probability, token = best_tokens(hidden, weight, mask)
    expected, expected_token = best_token(hidden @ weight.T, mask)
    assert torch.equal(token, expected_token)
    torch.testing.assert_close(probability, expected)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 9), segments=st.integers(1, 4), odd=st.booleans(), seed=st.integers(0, 1000))
def test_maximum_any_width_finds_the_first_of_equals(count: int, segments: int, odd: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 9, (count, segments * head_relay.SEGMENT + odd), generator=generator).float()
    logits[:, seed % logits.shape[1]] = [torch.nan, torch.inf, -torch.inf, 8.0][seed % 4]
    best, column = head_relay._maximum(logits)
    torch.testing.assert_close(best, logits.amax(-1), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(column, logits.argmax(-1))


def test_score_positions_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    losses, confidence = score_positions(hidden, weight, torch.tensor([1, 2, 3]), 6)
    losses.sum().backward()
    assert weight.grad is None
    assert hidden.grad.abs().sum() > 0
    assert not confidence.requires_grad


def test_score_positions_autocast_is_that_of_a_linear_layer() -> None:
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    targets = torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = score_positions(hidden, weight, targets, 8)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (hidden, weight)]
    expected = F.cross_entropy(F.linear(*(leaf.bfloat16().float() for leaf in leaves)), targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    expected.sum().backward()
    assert weight.grad.dtype == torch.float32
    for leaf, like in zip((hidden, weight), leaves, strict=True):
        torch.testing.assert_close(leaf.grad, like.grad, rtol=2e-2, atol=1e-2)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 20), vocab=st.integers(2, 30), tile=st.integers(1, 200), seed=st.integers(0, 1000))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decides_by_products_that_are_not_rounded(
    dtype: torch.dtype, count: int, vocab: int, tile: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(count, 5, generator=generator), torch.randn(vocab, 5, generator=generator)
    hidden, weight, mask = hidden.to(dtype) * 5, weight.to(dtype), seed % vocab
    logits, targets = hidden.float() @ weight.float().T, torch.randint(0, vocab, (count,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(head_relay.TILE_NUMBERS, "cpu", tile)
        probability, token = best_tokens(hidden, weight, mask)
        losses, confidence = score_positions(hidden, weight, targets, mask)
        torch.testing.assert_close(deciding_logits(hidden, weight), logits)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-4, atol=1e-5)
    expected, expected_token = best_token(logits, mask)
    assert torch.equal(token, expected_token)
    for found in (probability, confidence):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_tokens_that_tie_when_rounded_are_told_apart() -> None:
    hidden = torch.tensor([[16.0, 0.0625]]).bfloat16()
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.5], [0.0, 0.0]]).bfloat16()
    assert (hidden @ weight.T)[0, 0] == (hidden @ weight.T)[0, 1]
    assert best_tokens(hidden, weight, 2)[1] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_device_that_multiplies_into_single_precision_is_asked_to(dtype: torch.dtype) -> None:
    """Meta tensors check dtypes as a GPU does, and a CPU refuses."""
    assert multiplies_into_single("meta")
    assert not multiplies_into_single("cpu")
    hidden, weight = torch.zeros(3, 4, dtype=dtype, device="meta"), torch.zeros(9, 4, dtype=dtype, device="meta")
    products = head_relay._products(hidden, weight)
    assert (products.dtype, products.shape) == (torch.float32, (3, 9))


def test_best_tokens_double_precision_is_not_rounded() -> None:
    hidden, weight = torch.tensor([[1.0, 1e-9]]).double(), torch.tensor([[1.0, 0.0], [1.0, 0.5], [0, 0]]).double()
    probability, token = best_tokens(hidden, weight, 2)
    assert (token, probability.dtype) == (1, torch.float32)
