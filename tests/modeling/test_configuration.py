"""RelayConfig: presets, what it refuses and what survives a file."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

from relay_hf import RelayConfig

from ..conftest import MASK, VOCAB_SIZE, text_config

RCD = {"relay_channel": "residual_context"}


def test_fast_dllm_v2_preset_is_published_instance(tiny_text_config: Qwen2Config) -> None:
    config = RelayConfig.fast_dllm_v2(tiny_text_config, mask_token_id=MASK)
    assert (config.block_size, config.token_shift) == (32, True)
    assert (config.relay_scope, config.relay_init, config.relay_readout) == ("masked", "zeros", "post_norm")
    assert (config.relay_channel, config.relay_layer, config.relay_norm_eps) == ("layer_norm", -1, 1e-6)


def test_fast_dllm_v2_preset_default_mask_token_is_published_one() -> None:
    assert RelayConfig.fast_dllm_v2({"model_type": "qwen2", "vocab_size": 151936}).mask_token_id == 151665


def test_sudoku_preset_is_published_instance(tiny_text_config: Qwen2Config) -> None:
    config = RelayConfig.sudoku(tiny_text_config, mask_token_id=MASK)
    assert (config.block_size, config.token_shift) == (None, False)
    assert (config.relay_scope, config.relay_init, config.relay_readout) == ("all", "ones", "pre_norm")
    assert (config.relay_channel, config.relay_layer, config.relay_norm_eps) == ("layer_norm", -1, 1e-5)


@pytest.mark.parametrize("preset", [RelayConfig.fast_dllm_v2, RelayConfig.sudoku])
def test_preset_override_wins(preset: Any, tiny_text_config: Qwen2Config) -> None:
    config = preset(tiny_text_config, mask_token_id=MASK, block_size=4, relay_initial_state="none")
    assert (config.block_size, config.relay_initial_state) == (4, "none")


@pytest.mark.parametrize("preset", [RelayConfig.fast_dllm_v2, RelayConfig.sudoku])
def test_save_pretrained_round_trip_equal(preset: Any, tiny_text_config: Qwen2Config, tmp_path: Path) -> None:
    config = preset(tiny_text_config, mask_token_id=MASK, relay_initial_state="none")
    config.save_pretrained(tmp_path)
    for loaded in (AutoConfig.from_pretrained(tmp_path), RelayConfig.from_pretrained(tmp_path)):
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()


def test_save_pretrained_other_backbone_kept(tmp_path: Path) -> None:
    RelayConfig(text_config=LlamaConfig(vocab_size=VOCAB_SIZE, num_hidden_layers=3), mask_token_id=1).save_pretrained(
        tmp_path
    )
    text_config = RelayConfig.from_pretrained(tmp_path).text_config
    assert isinstance(text_config, LlamaConfig)
    assert text_config.num_hidden_layers == 3


def test_text_config_dictionary_same_as_object(tiny_text_config: Qwen2Config) -> None:
    from_dictionary = RelayConfig(text_config=tiny_text_config.to_dict(), mask_token_id=MASK)
    assert from_dictionary.to_dict() == RelayConfig(text_config=tiny_text_config, mask_token_id=MASK).to_dict()


@pytest.mark.parametrize("ties", [False, True])
def test_tie_word_embeddings_unset_follows_backbone(tiny_text_config: Qwen2Config, ties: bool) -> None:
    tiny_text_config.tie_word_embeddings = ties
    assert RelayConfig(text_config=tiny_text_config).tie_word_embeddings is ties


@pytest.mark.parametrize("mask_token_id", [-1, VOCAB_SIZE])
def test_mask_token_outside_vocabulary_raises(tiny_text_config: Qwen2Config, mask_token_id: int) -> None:
    with pytest.raises(
        ValueError,
        match=f"`mask_token_id={mask_token_id}` is outside the vocabulary of 64 tokens: let `relay_hf.convert",
    ):
        RelayConfig(text_config=tiny_text_config, mask_token_id=mask_token_id)


@pytest.mark.parametrize("mask_token_id", [0, VOCAB_SIZE - 1])
def test_mask_token_at_either_end_of_vocabulary_accepted(tiny_text_config: Qwen2Config, mask_token_id: int) -> None:
    assert RelayConfig(text_config=tiny_text_config, mask_token_id=mask_token_id).mask_token_id == mask_token_id


@pytest.mark.parametrize("relay_layer", [-3, 2])
def test_relay_layer_outside_backbone_raises(tiny_text_config: Qwen2Config, relay_layer: int) -> None:
    with pytest.raises(ValueError, match=f"`relay_layer={relay_layer}` does not exist in a backbone of 2 layers"):
        RelayConfig(text_config=tiny_text_config, relay_layer=relay_layer, relay_readout="pre_norm")


@pytest.mark.parametrize("relay_layer", [-2, 0])
def test_relay_readout_post_norm_of_inner_layer_raises(tiny_text_config: Qwen2Config, relay_layer: int) -> None:
    with pytest.raises(ValueError, match=r"'post_norm'` reads behind the last layer.* `relay_readout='pre_norm'`"):
        RelayConfig(text_config=tiny_text_config, relay_layer=relay_layer)


@pytest.mark.parametrize("block_size", [0, -8])
def test_block_size_below_one_raises(tiny_text_config: Qwen2Config, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"`block_size={block_size}` must be at least 1"):
        RelayConfig(text_config=tiny_text_config, block_size=block_size)


def test_unknown_relay_option_raises(tiny_text_config: Qwen2Config) -> None:
    with pytest.raises(ValueError, match=r"Unknown relay option\(s\) \['relay_chanel'\]"):
        RelayConfig(text_config=tiny_text_config, relay_chanel="none")


@pytest.mark.parametrize("field", ["relay_readout", "relay_scope", "relay_init", "relay_initial_state"])
def test_unknown_choice_raises(tiny_text_config: Qwen2Config, field: str) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{field}' expected one of"):
        RelayConfig(text_config=tiny_text_config, **{field: "other"})


@pytest.mark.parametrize(
    "text_config",
    [
        # Says so layer by layer, or only by its window.
        Gemma2Config(vocab_size=VOCAB_SIZE, num_hidden_layers=2),
        MistralConfig(vocab_size=VOCAB_SIZE, sliding_window=8),
        Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1, num_hidden_layers=2),
    ],
    ids=lambda config: config.model_type,
)
def test_sliding_window_backbone_raises(text_config: Any) -> None:
    with pytest.raises(ValueError, match=r"'sliding_attention'.*not support"):
        RelayConfig(text_config=text_config)


def test_backbone_with_sliding_window_switched_off_accepted() -> None:
    config = RelayConfig(text_config=MistralConfig(vocab_size=VOCAB_SIZE, sliding_window=None))
    assert config.text_config.model_type == "mistral"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 10**9}, "`block_size=1000000000` exceeds the 512 positions of the backbone"),
        ({"block_size": -8}, "`block_size=-8` must be at least 1"),
        ({"relay_norm_eps": float("nan")}, "`relay_norm_eps=nan` is not a finite number"),
        ({"relay_norm_eps": 0.0}, "`relay_norm_eps=0.0` must lie between 0 and 1"),
        ({"relay_norm_eps": -1e-5}, "`relay_norm_eps=-1e-05` must lie between 0 and 1"),
        (RCD | {"relay_temperature": 0.0}, "`relay_temperature=0.0` must be above 0"),
        (RCD | {"relay_temperature": float("inf")}, "`relay_temperature=inf` must be above 0, and finite"),
        (RCD | {"relay_temperature": float("nan")}, "`relay_temperature=nan` must be above 0, and finite"),
        (
            {"relay_channel": "soft_mask", "relay_top_k": 65},
            "`relay_top_k=65` must be at least 1, and at most the 64 tokens",
        ),
        ({"mask_token_id": 64}, "`mask_token_id=64` is outside the vocabulary of 64 tokens"),
        ({"mask_token_id": -1}, "`mask_token_id=-1` is outside the vocabulary"),
    ],
)
def test_config_absurd_value_raises(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelayConfig(text_config=text_config(), **{"block_size": 8, "mask_token_id": 63, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm_eps": float("nan")}, "`rms_norm_eps=nan` is not a finite number"),
        ({"rms_norm_eps": -1.0}, "`rms_norm_eps=-1.0` must lie between 0 and 1"),
        ({"initializer_range": float("inf")}, "`initializer_range=inf` is not a finite number"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers=0` must be at least 1"),
        ({"hidden_size": 0}, "`hidden_size=0` must be at least 1"),
        ({"max_position_embeddings": -5}, "`max_position_embeddings=-5` must be at least 1"),
    ],
)
def test_config_absurd_backbone_raises(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelayConfig(text_config=text_config(**fields), mask_token_id=63, block_size=8)


@pytest.mark.parametrize("name", ["other", "", "LAYER_NORM"])
def test_unknown_channel_raises(tiny_text_config: Qwen2Config, name: str) -> None:
    message = rf"`relay_channel='{name}'` is unknown: choose one of \[.*'layer_norm'.*\], or first import the module"
    with pytest.raises(ValueError, match=message):
        RelayConfig(text_config=tiny_text_config, relay_channel=name)


def test_text_config_object_unchanged(tiny_text_config: Qwen2Config) -> None:
    before = tiny_text_config.to_dict()
    config = RelayConfig(text_config=tiny_text_config, mask_token_id=MASK, relay_readout="pre_norm")
    assert tiny_text_config.to_dict() == before
    assert config.text_config is not tiny_text_config
