"""Packed blocks attend as the dense mask says, with the same gradients, and keep no mask of all queries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from relay_hf.modeling.attention_packed_relay import attend_packed, dense_mask, packed_pattern


def by_definition(seen: torch.Tensor, size: int, total: int) -> torch.Tensor:
    """(n, 1, L, K) bool, position by position."""
    length = seen.shape[1] * size
    mask = torch.zeros(len(seen), 1, length, total, dtype=torch.bool)
    for row in range(len(seen)):
        for query in range(length):
            block = query // size
            mask[row, 0, query, : seen[row, block]] = True
            begin = total - length + block * size
            mask[row, 0, query, begin : begin + size] = True
    return mask


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 3, 8, 32, 40]),
    blocks=st.integers(1, 5),
    text=st.integers(0, 70),
    rows=st.integers(1, 3),
    shared=st.sampled_from([1, 2]),
    is_clean=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_packed_any_pattern_equals_the_dense_mask_with_gradients(
    size: int, blocks: int, text: int, rows: int, shared: int, is_clean: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    length, text = size * blocks, 0 if is_clean else text
    seen = torch.randint(0, text + 1, (rows, blocks), generator=generator)
    if is_clean:  # the blocks are the text
        seen = (torch.arange(blocks) * size)[None]
    pattern, total = packed_pattern(seen, size), text + length
    mask = dense_mask(pattern, length, total)
    assert torch.equal(mask, by_definition(seen, size, total))
    heads = [2 * shared, 2, 2]
    tensors = [
        torch.randn(rows, count, width, 8, generator=generator).requires_grad_()
        for count, width in zip(heads, (length, total, total), strict=True)
    ]
    output = attend_packed(*tensors, pattern, 0.3)
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=0.3, enable_gqa=shared > 1)
    torch.testing.assert_close(output, expected)
    weights = torch.randn(output.shape, generator=generator)
    results, wanted = (torch.autograd.grad((o * weights).sum(), tensors) for o in (output, expected))
    torch.testing.assert_close(results, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [256, 512])
def test_packed_holds_no_tensor_of_all_queries_and_keys(length: int) -> None:
    saved: list[int] = []
    tensors = [torch.randn(1, 1, length, 4).requires_grad_() for _ in range(3)]
    pattern = packed_pattern((torch.arange(length // 32) * 32)[None], 32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        attend_packed(*tensors, pattern, None)
    assert sum(saved) <= 3 * length * 4 + length


def test_packed_under_autocast_rounds_as_attention_does() -> None:
    tensors = [torch.randn(2, 2, 64, 8).requires_grad_() for _ in range(3)]
    pattern = packed_pattern(torch.tensor([[0, 32], [0, 32]]), 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attend_packed(*tensors, pattern, None)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors)
