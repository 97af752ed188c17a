import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_hf.trainers.rollouts.noise import mask_uniformly, stagger
from relay_hf.trainers.rollouts.rows import fresh_rows

from ..conftest import MASK, build_model, build_rows


def seeded(seed: int, rows: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(rows)]


BLOCKS, WHOLE = build_model().config, build_model(block_size=None).config


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 6), length=st.integers(4, 15), prompt=st.integers(0, 3), seed=st.integers(0, 2**31))
def test_mask_uniformly_masks_only_labels_and_at_least_one_a_row(
    count: int, length: int, prompt: int, seed: int
) -> None:
    batch = build_rows(count, length, prompt)
    for config in (BLOCKS, WHOLE):
        rows = mask_uniformly(fresh_rows(config, batch, False), config, seeded(seed, count))
        masked = rows.masked
        assert masked.any(-1).all()
        assert not masked[:, length:].any()
        masked = masked[:, :length]
        assert not (masked & (batch["labels"] == -100)).any()
        assert torch.equal(rows.noisy_ids(MASK)[:, :length][~masked], batch["input_ids"][~masked])


def test_mask_uniformly_fraction_is_uniform() -> None:
    batch = build_rows(4000, 40, 0)
    rows = mask_uniformly(fresh_rows(WHOLE, batch, False), WHOLE, seeded(0, 4000))
    fractions = rows.masked.float().mean(-1)
    quartiles = torch.quantile(fractions, torch.tensor([0.25, 0.5, 0.75]))
    # 4000 draws of U(0, 1): a quartile has a standard error below 0.01.
    torch.testing.assert_close(quartiles, torch.tensor([0.25, 0.5, 0.75]), rtol=0, atol=0.04)


def test_mask_uniformly_same_generator_same_masks() -> None:
    rows = fresh_rows(BLOCKS, build_rows(4), False)
    draws = [mask_uniformly(rows, BLOCKS, seeded(s, 4)).masked for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_mask_uniformly_block_model_draws_per_block() -> None:
    batch = build_rows(2000, 8, 0)
    rows = mask_uniformly(fresh_rows(BLOCKS, batch, False), BLOCKS, seeded(0, 2000))
    per_block = rows.masked.float().view(2000, 2, 4).mean(-1)
    correlation = torch.corrcoef(per_block.T)[0, 1]
    assert abs(float(correlation)) < 0.1


def test_mask_uniformly_longer_padding_leaves_the_masks_alone() -> None:
    for config in (BLOCKS, WHOLE):
        rows = fresh_rows(config, build_rows(3, length=10), keeps_state=False)
        short, long = (mask_uniformly(each, config, seeded(1, 3)) for each in (rows, rows.fit(15)))
        assert torch.equal(short.masked, long.masked[:, : short.masked.shape[1]])


def test_stagger_masks_ever_fewer_positions() -> None:
    torch.manual_seed(0)
    rows = stagger(fresh_rows(WHOLE, build_rows(5, length=203), keeps_state=False))
    assert rows.masked[0].sum() == 200
    for row, fraction in enumerate(rows.masked.sum(-1) / 200):
        assert float(fraction) == pytest.approx(1 - row / 5, abs=0.1)
    assert not (rows.masked & ~rows.learned).any()
