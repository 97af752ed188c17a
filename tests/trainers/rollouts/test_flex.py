"""FlexAttention in training: the losses of dense masks, and few shapes to compile. A CPU runs it forward only."""

from functools import partial
from typing import Any

import pytest
import torch
import transformers.integrations.flex_attention as their_flex
from torch.nn.attention.flex_attention import flex_attention

from relay_hf.modeling import make_policy
from relay_hf.trainers.rollouts import denoiser
from relay_hf.trainers.rollouts.denoiser import make_denoiser
from relay_hf.trainers.rollouts.packing import Layout
from relay_hf.trainers.rollouts.rollout import Rollout
from relay_hf.trainers.rollouts.rows import RolloutRows

from ..conftest import begin_rollout, build_model
from .test_denoiser import partly_denoised

Shape = tuple[int, int]


@pytest.fixture
def shapes(plain_flex: None, monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Numbers of queries and keys of all calls."""
    seen: list[Shape] = []

    def attend(query: Any, key: Any, value: Any, training: bool = False, **options: Any) -> Any:
        seen.append((query.shape[2], key.shape[2]))
        return flex_attention(query, key, value, **options)

    monkeypatch.setattr(their_flex, "compile_friendly_flex_attention", attend)
    return seen


@torch.no_grad()
def run(attention: str, lengths: list[int], width: int | None = None, **options: Any) -> Rollout:
    model = build_model(**options)
    model.set_attn_implementation(attention)
    rows: RolloutRows = partly_denoised(model, lengths, prompt=3, seed=len(lengths), fresh=False)
    layout = None if width is None else Layout(rows, width, model.config.block_size)
    make = partial(make_denoiser, layout=layout)
    rollout = begin_rollout(model, rows, [make_policy("confidence_threshold", 0.2)] * 2, "relay", make=make)
    rollout.run_window()
    return rollout


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_shift": False},
        {"relay_scope": "all"},
        {"block_size": 5},
        {"width": 24},
        {"width": 24, "block_size": None},
    ],
    ids=str,
)
def test_flex_attention_gives_the_losses_of_dense_masks(shapes: list[Shape], options: dict[str, Any]) -> None:
    lengths = [7, 14, 9]
    result = run("flex_attention", lengths, **options)
    expected = run("sdpa", lengths, **{**options, "width": None})
    torch.testing.assert_close(result.step_losses, expected.step_losses, rtol=1e-4, atol=1e-4)
    assert torch.equal(result.rows.masked, expected.rows.masked)
    text = expected.rows.attention_mask[..., None]
    torch.testing.assert_close(result.rows.relay_state * text, expected.rows.relay_state * text, rtol=1e-4, atol=1e-4)
    assert shapes


def test_flex_attention_sees_whole_tiles_and_few_shapes(shapes: list[Shape], monkeypatch: pytest.MonkeyPatch) -> None:
    different = {}
    for tile in (4, 16):  # one block, or four
        monkeypatch.setattr(denoiser, "FLEX_TILE", tile)
        shapes.clear()
        for length in range(20, 60, 3):
            run("flex_attention", [length, length - 7])
        assert all(size % tile == 0 for shape in shapes for size in shape)
        different[tile] = len(set(shapes))
    assert different[16] <= different[4] / 2, different
