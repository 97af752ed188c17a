"""A checkpoint of which a part is missing is refused; a channel that nobody has trained yet may be missing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from relay_hf import RelayForMaskedDiffusion

from ..conftest import MASK, text_config

MakeModel = Callable[..., RelayForMaskedDiffusion]


def remove(folder: Path, *parts: str) -> None:
    """Takes all weights out of a checkpoint whose names begin like this."""
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(parts)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    make_model(open_channel=True).save_pretrained(tmp_path / "relay")
    return tmp_path / "relay"


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    Qwen2ForCausalLM(text_config()).save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


@pytest.mark.parametrize(
    "parts",
    [("relay.norm.bias",), ("relay.",), ("model.layers.1.self_attn.q_proj.weight",), ("lm_head",), ("model.layers.1",)],
)
def test_relay_checkpoint_without_a_part_raises(folder: Path, parts: tuple[str, ...]) -> None:
    remove(folder, *parts)
    with pytest.raises(
        ValueError, match=rf"relay` is not whole, it lacks \d+ weights \(`{parts[0]}.*: save or download"
    ):
        RelayForMaskedDiffusion.from_pretrained(folder)


@pytest.mark.parametrize("parts", [("model.layers.1",), ("model.layers.1", "lm_head"), ("model.norm",)])
def test_decoder_without_a_part_raises(decoder: Path, parts: tuple[str, ...]) -> None:
    remove(decoder, *parts)
    with pytest.raises(ValueError, match=r"decoder` is not whole, it lacks"):
        RelayForMaskedDiffusion.from_pretrained(decoder, mask_token_id=MASK)


def test_soft_mask_channel_that_is_missing_raises(make_model: MakeModel, tmp_path: Path) -> None:
    make_model(relay_channel="soft_mask").save_pretrained(tmp_path)
    remove(tmp_path, "relay.")
    with pytest.raises(ValueError, match=r"lacks 1 weights \(`relay.weight`\)"):
        RelayForMaskedDiffusion.from_pretrained(tmp_path)


def test_fresh_channel_on_a_model_that_had_none_loads(folder: Path, decoder: Path, make_model: MakeModel) -> None:
    plain = RelayForMaskedDiffusion.from_pretrained(decoder, mask_token_id=MASK)
    assert not plain.relay.norm.weight.any()
    # As an adapter does with its plain base.
    other = RelayForMaskedDiffusion.from_pretrained(decoder, config=plain.config)
    assert torch.equal(other.lm_head.weight, plain.lm_head.weight)
    make_model(relay_channel="none").save_pretrained(folder)
    assert not RelayForMaskedDiffusion.from_pretrained(folder, relay_channel="layer_norm").relay.norm.weight.any()
    make_model(tie_word_embeddings=True).save_pretrained(folder)
    RelayForMaskedDiffusion.from_pretrained(folder)


def test_vocabulary_without_the_mask_token_raises(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(
        ValueError, match=f"`new_num_tokens=40` leaves no row for .MASK., whose id is {MASK}: keep at least"
    ):
        model.resize_token_embeddings(40)
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == MASK + 1
    assert model.resize_token_embeddings(MASK + 9).num_embeddings == MASK + 9
