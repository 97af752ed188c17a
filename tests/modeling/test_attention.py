"""Attention implementations: the same pattern whoever computes attention, or a refusal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.modeling.attention_blocks_relay import BLOCK_ATTENTION

from ..conftest import MASK, text_config
from .decoding import padded, prompts_of, run

IDS = torch.randint(1, MASK, (2, 24), generator=torch.Generator().manual_seed(0))
REFUSED = r"^`attn_implementation='{}'` is not given a mask by transformers.*'sdpa', 'eager' or 'flex_attention'"


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Registers sdpa under the name of `mine`, the public way, until the test ends."""

    def apply(mask_function: Callable | None = None) -> str:
        for interface, function in (
            (AttentionInterface, sdpa_attention_forward),
            (AttentionMaskInterface, mask_function),
        ):
            monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
            if function is not None:
                interface.register("mine", function)
        return "mine"

    return apply


@pytest.mark.parametrize("mask_function", [None, flash_attention_mask], ids=["none", "flash"])
def test_attention_without_a_mask_is_refused_wherever_it_is_set(
    make_model: Callable, register: Callable[..., str], mask_function: Callable | None, tmp_path: Path
) -> None:
    name, model = register(mask_function), make_model()
    for argument in (name, {"text_config": name}):
        with pytest.raises(ValueError, match=REFUSED.format(name)):
            model.set_attn_implementation(argument)
    assert (model.config._attn_implementation, model.model.config._attn_implementation) == (BLOCK_ATTENTION,) * 2
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REFUSED.format(name)):
        RelayForMaskedDiffusion.from_pretrained(tmp_path, attn_implementation=name)
    config = RelayConfig(text_config=text_config(), block_size=8, mask_token_id=MASK)
    config.text_config._attn_implementation = name
    with pytest.raises(ValueError, match=REFUSED.format(name)):
        RelayForMaskedDiffusion(config)
    model.model.config._attn_implementation = name  # past all of our methods
    for block in (IDS, IDS[:, :8]):
        with pytest.raises(ValueError, match=REFUSED.format(name)):
            model(block)


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn", "paged|sdpa"])
def test_flash_and_paged_attention_are_refused_in_our_words(make_model: Callable, name: str, tmp_path: Path) -> None:
    """Before transformers looks for their packages."""
    model = make_model()
    with pytest.raises(ValueError, match="is not given a mask by transformers"):
        model.set_attn_implementation(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not given a mask by transformers"):
        RelayForMaskedDiffusion.from_pretrained(tmp_path, attn_implementation=name)


@torch.no_grad()
def test_attention_with_a_mask_function_of_its_own_is_used(make_model: Callable, register: Callable[..., str]) -> None:
    model = make_model()
    model.set_attn_implementation("sdpa")
    expected = model(IDS).logits
    model.set_attn_implementation(register(sdpa_mask))
    assert model.model.config._attn_implementation == "mine"
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("block_size", [8, None])
@pytest.mark.parametrize("ragged", [False, True])
@torch.no_grad()
def test_flex_attention_forward_equals_sdpa(
    make_model: Callable, plain_flex: None, block_size: int | None, ragged: bool
) -> None:
    model = make_model(block_size=block_size)
    inputs: Any = padded(prompts_of((13, 20)), "left") if ragged else {"input_ids": IDS}
    rows = inputs["attention_mask"].bool() if ragged else torch.ones_like(IDS, dtype=torch.bool)
    expected = model(**inputs).logits
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(**inputs).logits[rows], expected[rows], atol=1e-4, rtol=1e-4)


OPTIONS: list[dict[str, Any]] = [{}, {"sub_block_size": 4, "use_sub_block_cache": True}, {"fuse_commits": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@pytest.mark.parametrize("attention", ["flex_attention", "eager"])
def test_ragged_batch_decodes_the_same_under_every_attention(
    make_model: Callable, plain_flex: None, attention: str, side: str, options: dict[str, Any]
) -> None:
    """Rows wait for each other, so there are forwards over some of the rows."""
    model = make_model(open_channel=True, token_shift=True)
    inputs = padded(prompts_of((3, 13, 8)), side)
    expected = run(model, inputs, max_new_tokens=20, **options)
    assert len(set(expected.denoise_forwards.tolist())) > 1
    model.set_attn_implementation(attention)
    output = run(model, inputs, max_new_tokens=20, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.denoise_forwards, expected.denoise_forwards)
