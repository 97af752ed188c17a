"""`convert`: the choice of [MASK], what comes along, what is reported, and what is refused without leaving a trace."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from relay_hf import RelayForMaskedDiffusion, convert
from relay_hf.cli import main
from relay_hf.testing import CHAT_TEMPLATE, byte_tokenizer

from .conftest import UNUSED, VOCAB_SIZE

EMBEDDINGS = "model.embed_tokens.weight"

# -- the mask token ----------------------------------------------------------------------------------------------------


def test_mask_token_of_tokenizer_is_taken(write_source: Callable, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    source, _ = write_source("qwen2", tokenizer=tokenizer)
    report = convert(source, tmp_path / "out")
    assert (report.mask_token_id, report.mask_token) == (258, "`[MASK]` of the tokenizer")
    assert AutoModel.from_pretrained(tmp_path / "out").config.mask_token_id == 258


def test_mask_token_takes_unused_row_and_leaves_weights_alone(write_source: Callable, tmp_path: Path) -> None:
    source, family = write_source("qwen2")
    report = convert(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (report.mask_token_id, tokenizer.mask_token, tokenizer.mask_token_id) == (UNUSED, "|<MASK>|", UNUSED)
    assert "an unused row" in report.mask_token
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(saved[EMBEDDINGS], family.twin.state_dict()[EMBEDDINGS])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_token_without_room_adds_mean_row(
    write_source: Callable, tmp_path: Path, ties: bool, dtype: torch.dtype
) -> None:
    tokenizer = byte_tokenizer(mask_token=None)
    tokenizer.add_tokens([f"<{i}>" for i in range(VOCAB_SIZE - len(tokenizer))])
    source, family = write_source("qwen2", ties=ties, dtype=dtype, tokenizer=tokenizer)
    report = convert(source, tmp_path / "out")
    assert (report.mask_token_id, len(report.initialised)) == (VOCAB_SIZE, 3 if ties else 4)
    model, saved = AutoModel.from_pretrained(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    assert model.config.mask_token_id == VOCAB_SIZE
    assert model.config.text_config.vocab_size == VOCAB_SIZE + 1
    assert ("lm_head.weight" in saved) != ties
    for name in {EMBEDDINGS, "lm_head.weight"} & saved.keys():
        old = family.twin.state_dict()[name]
        assert torch.equal(saved[name], torch.cat([old, old.float().mean(0, keepdim=True).to(dtype)]))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == VOCAB_SIZE
    assert model.generate(torch.arange(5)[None], max_new_tokens=3, eos_token_id=None).shape == (1, 8)


def test_mask_token_of_tokenizer_beyond_embeddings_adds_row(write_source: Callable, tmp_path: Path) -> None:
    """As of a tokenizer that got its mask token before the model did."""
    tokenizer = byte_tokenizer(mask_token=None)
    tokenizer.add_tokens([f"<{i}>" for i in range(VOCAB_SIZE - len(tokenizer) + 1)])
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    source, _ = write_source("qwen2", tokenizer=tokenizer)
    report = convert(source, tmp_path / "out")
    assert (report.mask_token_id, tokenizer.mask_token_id) == (VOCAB_SIZE + 1, VOCAB_SIZE + 1)
    assert report.mask_token == "`[MASK]` of the tokenizer, on a new row of the embeddings"
    assert AutoModel.from_pretrained(tmp_path / "out").config.text_config.vocab_size == VOCAB_SIZE + 2


def test_mask_token_given_replaces_that_of_the_family(write_source: Callable, tmp_path: Path) -> None:
    source, _ = write_source("sdar")
    report = convert(source, tmp_path / "out", mask_token_id=259)
    assert (report.mask_token_id, report.mask_token) == (259, "as given")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token == "<|b|>"


def test_mask_token_unknown_to_tokenizer_is_noted(write_source: Callable, tmp_path: Path) -> None:
    source, _ = write_source("sdar")
    report = convert(source, tmp_path / "out", mask_token_id=263)
    assert report.mask_token == "as given; the tokenizer has no such token"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token is None


def test_tokenizer_whose_ids_have_gaps_raises(write_source: Callable, tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 2}, unk_token="a"))
    source, _ = write_source("qwen2", tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(ValueError, match="the id 2, which another has, because its ids have gaps"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("mask_token_id", "message"),
    [
        (VOCAB_SIZE, "outside the embeddings of 264 tokens: leave it out, and `convert` adds"),
        (257, "is the tokenizer's `pad_token`"),
    ],
)
def test_mask_token_that_cannot_be_one_raises(
    write_source: Callable, tmp_path: Path, mask_token_id: int, message: str
) -> None:
    source, _ = write_source("qwen2")
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", mask_token_id=mask_token_id)
    assert not (tmp_path / "out").exists()


def test_source_without_tokenizer_needs_mask_token(write_source: Callable, tmp_path: Path) -> None:
    source, _ = write_source("qwen2", tokenizer=None)
    with pytest.raises(ValueError, match="no tokenizer to find an unused id in: pass `mask_token_id`"):
        convert(source, tmp_path / "out")
    report = convert(source, tmp_path / "out", mask_token_id=263)
    assert report.mask_token == "as given; there is no tokenizer"
    assert "the source has no tokenizer" in report.notes
    assert not list((tmp_path / "out").glob("token*"))


# -- what comes along --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2", "fast_dllm", "sdar", "llada", "dream"])
def test_tokenizer_template_and_generation_defaults_come_along(
    write_source: Callable, tmp_path: Path, name: str
) -> None:
    defaults = {"do_sample": True, "temperature": 0.7, "eos_token_id": [256, 12], "use_cache": False}
    source, _ = write_source(name, generation=defaults)
    convert(source, tmp_path / "out")
    model, tokenizer = AutoModel.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("[PAD]", "[EOS]")
    ours = model.generation_config
    assert (ours.do_sample, ours.temperature, ours.eos_token_id) == (True, 0.7, [256, 12])
    # From the tokenizer, as the source's file has none.
    assert ours.pad_token_id == 257
    assert model.generate(torch.arange(5)[None], max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize("name", ["sdar", "llada", "dream"])
def test_generation_defaults_in_config_come_along(write_source: Callable, tmp_path: Path, name: str) -> None:
    source, _ = write_source(name)
    convert(source, tmp_path / "out")
    assert AutoModel.from_pretrained(tmp_path / "out").generation_config.eos_token_id == 256


def test_options_replace_those_of_the_source(write_source: Callable, tmp_path: Path) -> None:
    source, _ = write_source("fast_dllm")
    report = convert(source, tmp_path / "out", block_size=None, token_shift=False, relay_channel="none")
    config = AutoModel.from_pretrained(tmp_path / "out").config
    assert (config.block_size, config.token_shift, config.relay_channel) == (None, False, "none")
    assert (report.block_size, report.token_shift, report.relay_channel) == (None, False, "none")


def test_checkpoint_in_the_older_file_format_converts(write_source: Callable, tmp_path: Path) -> None:
    source, _ = write_source("llada")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    expected = convert(source, tmp_path / "first")
    (source / "model.safetensors").unlink()
    report = convert(source, tmp_path / "second")
    assert report.renamed == expected.renamed
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


# -- the report --------------------------------------------------------------------------------------------------------


def test_report_tells_what_became_of_every_parameter(write_source: Callable, tmp_path: Path) -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    source, family = write_source("llada", extra_weights=buffers)
    report = convert(source, tmp_path / "out")
    assert set(report.renamed.values()) == set(family.twin.state_dict())
    assert report.initialised == ["relay.norm.weight", "relay.norm.bias"]
    assert sorted(report.left_out) == sorted(buffers)
    text = str(report)
    assert "family       llada on the backbone llama" in text
    assert "the whole sequence at once, without token shift" in text
    assert (
        "renamed      model.transformer.blocks.*.ff_proj.weight -> model.layers.*.mlp.gate_proj.weight (2 layers)"
        in text
    )
    assert "left out     model.layers.*.self_attn.rotary_emb.inv_freq (2 layers)" in text
    assert "initialised  relay.norm.weight" in text


def test_report_without_channel_lists_it_as_left_out(reference: Path, tmp_path: Path) -> None:
    report = convert(reference / "checkpoint", tmp_path / "out", relay_channel="none")
    assert sorted(report.left_out) == ["relay.norm.bias", "relay.norm.weight"]
    assert not report.initialised


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SIZES),
        LlamaConfig(**SIZES),
        MistralConfig(**SIZES, sliding_window=None),
        GemmaConfig(**SIZES),
        MixtralConfig(**SIZES, num_local_experts=4),
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
        OPTConfig(**SIZES, word_embed_proj_dim=16, ffn_dim=32),
    ],
    ids=lambda config: config.model_type,
)
@torch.no_grad()
def test_causal_decoder_in_blocks_of_one_same_logits(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    base.save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out", mask_token_id=63, block_size=1)
    model, ids = AutoModel.from_pretrained(tmp_path / "out"), torch.arange(20)[None]
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == config.tie_word_embeddings
    # The file holds single experts, the model all of a layer in one tensor; three projections each.
    has_experts = config.model_type in ("mixtral", "qwen3_moe")
    assert len([name for name in report.merged if "experts.3." in name]) == (2 * 3 if has_experts else 0)
    torch.testing.assert_close(model(ids).logits[:, 1:], base(ids).logits[:, :-1], atol=1e-4, rtol=1e-4)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_output_that_exists_raises_and_is_left_alone(write_source: Callable, tmp_path: Path) -> None:
    source, _ = write_source("qwen2")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        convert(source, tmp_path / "out")
    (tmp_path / "out" / "thesis.txt").unlink()
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_error_while_writing_leaves_nothing_behind(
    write_source: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = write_source("qwen2")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_relay_model_as_source_raises(write_source: Callable, tmp_path: Path) -> None:
    source, _ = write_source("qwen2")
    convert(source, tmp_path / "out")
    with pytest.raises(ValueError, match="is a relay model already"):
        convert(tmp_path / "out", tmp_path / "again")


def test_source_without_head_raises(write_source: Callable, tmp_path: Path) -> None:
    source, family = write_source("qwen2")
    family.twin.model.save_pretrained(source)
    with pytest.raises(ValueError, match=r"lacks `lm_head.weight`, which the model would have to invent"):
        convert(source, tmp_path / "out")


def test_source_whose_head_has_a_bias_raises(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    PhiForCausalLM(PhiConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"head has a bias \(`lm_head.bias`\)"):
        convert(tmp_path / "source", tmp_path / "out", mask_token_id=63)
    with pytest.raises(ValueError, match=r"head has a bias \(`lm_head.bias`\)"):
        RelayForMaskedDiffusion.from_pretrained(tmp_path / "source", mask_token_id=63)


def test_source_with_parameters_of_its_own_raises(write_source: Callable, tmp_path: Path) -> None:
    source, _ = write_source("qwen2", extra_weights={"model.layers.0.adapter.weight": torch.ones(16)})
    with pytest.raises(ValueError, match=r"has `model.layers.0.adapter.weight`, for which a relay model has no place"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_source_with_names_of_another_kind_raises(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"is not whole, it lacks 31 weights \(`lm_head.weight`, `model.h.0"):
        convert(tmp_path / "source", tmp_path / "out", mask_token_id=63)


def test_option_that_no_relay_model_has_raises(write_source: Callable, tmp_path: Path) -> None:
    source, _ = write_source("qwen2")
    with pytest.raises(ValueError, match=r"does not take \['blocksize'\]"):
        convert(source, tmp_path / "out", blocksize=8)


def test_backbone_that_lacks_something_raises(write_source: Callable, tmp_path: Path) -> None:
    source, _ = write_source("qwen2", model_type="mistral", sliding_window=8)
    with pytest.raises(ValueError, match="The backbone `mistral` is not supported"):
        convert(source, tmp_path / "out")


# -- the command -------------------------------------------------------------------------------------------------------


def test_command_converts_and_prints_the_report(
    write_source: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source, _ = write_source("qwen2")
    options = ["--mask-token-id", "261", "--block-size", "0", "--token-shift", "false", "--dtype", "bfloat16"]
    assert main(["convert", str(source), str(tmp_path / "out"), *options]) == 0
    assert "mask token   261, as given" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mask_token_id"], config["block_size"], config["token_shift"]) == (261, None, False)
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--block-size", "-1"], "`--block-size=-1` must be at least 1"),
        (["--relay-channel", "telepathy"], "relay_channel"),
        (["--mask-token-id", "999"], "outside the embeddings"),
    ],
)
def test_command_bad_argument_is_one_sentence(
    write_source: Callable, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    source, _ = write_source("qwen2")
    assert main(["convert", str(source), str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert message in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_command_source_that_is_no_model_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    assert main(["convert", str(tmp_path / name), str(tmp_path / "out")]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"relay-hf: error: `{tmp_path / name}` ")
    assert not (tmp_path / "out").exists()


def test_conversion_twice_gives_the_same_files(write_source: Callable, tmp_path: Path) -> None:
    source, _ = write_source("llada")
    for name in ("first", "second"):
        convert(source, tmp_path / name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
