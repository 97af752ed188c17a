"""Every family that can be converted computes afterwards what it computed before, and decodes."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, Qwen2Tokenizer

from relay_hf import RelayConfig, RelayForMaskedDiffusion, convert
from relay_hf.loading.tokenizer import load_tokenizer
from relay_hf.modeling.loading_families_relay import foreign_config_to_relay

from ..conftest import text_config
from .conftest import make_tokenizer

FAMILIES = ["qwen2", "fast_dllm", "sdar", "llada", "dream"]


@pytest.fixture
def ids() -> Tensor:
    """(2, 20), with the families' [MASK] in every block."""
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    return tokens.index_fill(1, torch.tensor([1, 6, 9, 13, 18]), 260)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_converted_model_same_logits_as_source(
    write_source: Callable, ids: Tensor, tmp_path: Path, name: str, ties: bool
) -> None:
    source, family = write_source(name, ties=ties)
    report = convert(source, tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert (model.config.block_size, model.config.token_shift) == (family.block_size, family.token_shift)
    assert (report.block_size, report.token_shift) == (family.block_size, family.token_shift)
    # Another kernel where there is no mask at all.
    torch.testing.assert_close(model(ids).logits, family.logits(ids), atol=1e-4, rtol=1e-4)
    state = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(ids, relay_state=state).logits, model(ids).logits)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == ties


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_source_loads_without_conversion(write_source: Callable, ids: Tensor, name: str) -> None:
    source, family = write_source(name)
    options = {"mask_token_id": 260} if name == "qwen2" else {}
    model, info = RelayForMaskedDiffusion.from_pretrained(source, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(model(ids).logits, family.logits(ids), atol=1e-4, rtol=1e-4)
    assert model.generate(ids[:1, 2:6], max_new_tokens=4, eos_token_id=None).shape == (1, 8)


@torch.no_grad()
def test_llada_same_logits_as_its_own_equations(write_source: Callable, ids: Tensor) -> None:
    """Written out with the names in its file: which projection is the gate, how positions turn, that all is seen."""
    source, _ = write_source("llada")
    weights = {
        name.removeprefix("model.transformer."): p for name, p in load_file(source / "model.safetensors").items()
    }
    width, heads, groups = 4, 4, 2

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name]

    def split(x: Tensor) -> Tensor:  # (B, L, heads * width) -> (B, 4, L, width), groups of two queries share a key
        x = x.unflatten(-1, (-1, width)).transpose(1, 2)
        return x.repeat_interleave(heads // x.shape[1], dim=1)

    def turn(x: Tensor) -> Tensor:
        angles = torch.arange(20)[:, None] * 500000.0 ** -(torch.arange(0, width, 2) / width)  # (L, width / 2)
        first, second = x.chunk(2, dim=-1)
        turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
        return torch.cat(turned, dim=-1)

    assert weights["blocks.0.k_proj.weight"].shape == (groups * width, 16)
    x = weights["wte.weight"][ids]
    for block in ("blocks.0.", "blocks.1."):
        y = norm(x, f"{block}attn_norm.weight")
        q, k, v = (split(y @ weights[f"{block}{name}_proj.weight"].T) for name in "qkv")
        seen = (turn(q) @ turn(k).mT / width**0.5).softmax(-1) @ v
        x = x + seen.transpose(1, 2).flatten(2) @ weights[f"{block}attn_out.weight"].T
        y = norm(x, f"{block}ff_norm.weight")
        gate, up = (y @ weights[f"{block}{name}_proj.weight"].T for name in ("ff", "up"))
        x = x + (gate * gate.sigmoid() * up) @ weights[f"{block}ff_out.weight"].T
    expected = norm(x, "ln_f.weight") @ weights["ff_out.weight"].T
    model = RelayForMaskedDiffusion.from_pretrained(source)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_output_says_nothing_of_the_family(write_source: Callable, tmp_path: Path, name: str) -> None:
    source, _ = write_source(name)
    convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "relay"
    foreign = {"auto_map", "bd_size", "use_mrope", "d_model", "n_heads", "alibi", "mask_token_id", "block_size"}
    assert not foreign & config["text_config"].keys()
    assert "auto_map" not in config
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize("name", FAMILIES)
def test_sharded_bfloat16_source_converts_bit_by_bit(write_source: Callable, tmp_path: Path, name: str) -> None:
    source, family = write_source(name, shards=3, dtype=torch.bfloat16)
    convert(source, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    twin = family.twin.state_dict()
    assert saved.keys() == twin.keys() | {"relay.norm.weight", "relay.norm.bias"}
    assert all(torch.equal(saved[key], tensor) for key, tensor in twin.items())
    assert saved["relay.norm.weight"].dtype == torch.float32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_dtype_given_is_the_one_saved(write_source: Callable, tmp_path: Path) -> None:
    source, _ = write_source("qwen2")
    convert(source, tmp_path / "out", dtype="bfloat16")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for name, t in saved.items() if not name.startswith("relay.")} == {torch.bfloat16}


@pytest.mark.parametrize("older", [False, True])
def test_published_relay_checkpoint_keeps_its_channel(
    reference: Path, reference_vectors: dict[str, Tensor], tmp_path: Path, older: bool
) -> None:
    source = reference / "checkpoint"
    config, weights = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    if older:
        names = {"use_relay": "use_loopholing", "relay_layer": "loophole_layer"}
        config = {names.get(name, name): value for name, value in config.items()}
        weights = {name.replace("relay_layer_norm", "h_t_layer_norm"): tensor for name, tensor in weights.items()}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    report = convert(tmp_path / "source", tmp_path / "out")
    norm = "h_t_layer_norm" if older else "relay_layer_norm"
    assert report.renamed == {f"model.{norm}.{part}": f"relay.norm.{part}" for part in ("weight", "bias")}
    assert not report.initialised
    inputs = {
        "input_ids": reference_vectors["forward.input_ids"],
        "relay_state": reference_vectors["forward.relay_state"],
    }
    ours, theirs = AutoModel.from_pretrained(tmp_path / "out"), RelayForMaskedDiffusion.from_pretrained(source)
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


RELOAD = """
import sys, relay_hf
from transformers import AutoModel, AutoTokenizer
for folder in sys.argv[1:]:
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a round trip", return_tensors="pt")["input_ids"]
    print(tokenizer.mask_token_id, model.generate(ids, max_new_tokens=9, eos_token_id=None).tolist())
"""


def test_every_family_generates_in_a_fresh_process(write_source: Callable, tmp_path: Path) -> None:
    """One process for all: starting it takes longer than everything that it does."""
    expected, folders = [], [tmp_path / name for name in FAMILIES]
    for folder in folders:
        source, _ = write_source(folder.name)
        report = convert(source, folder)
        source.rename(tmp_path / f"{folder.name}-source")
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("a round trip", return_tensors="pt")["input_ids"]
        assert tokenizer.mask_token_id == report.mask_token_id == model.config.mask_token_id
        tokens = model.generate(ids, max_new_tokens=9, eos_token_id=None).tolist()
        expected.append(f"{tokenizer.mask_token_id} {tokens}")
    shown = subprocess.run([sys.executable, "-c", RELOAD, *folders], capture_output=True, text=True, check=True)
    assert shown.stdout.strip().splitlines() == expected


def test_dream_tokenizer_of_its_own_class_read_without_remote_code(write_source: Callable, tmp_path: Path) -> None:
    source, _ = write_source("dream", tokenizer=None)
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "DreamTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
                "added_tokens_decoder": {
                    "256": {"content": "<|endoftext|>", "special": True},
                    "260": {"content": "<|mask|>", "special": True},
                },
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "mask_token": "<|mask|>",
            }
        )
    )
    convert(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert tokenizer.mask_token == "<|mask|>"
    assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def test_load_tokenizer_of_foreign_checkpoint_warns_of_nothing(
    write_source: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """Left to itself, transformers takes the family for an unknown model type."""
    source, _ = write_source("fast_dllm")
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        assert load_tokenizer(str(source), RelayConfig.from_pretrained(source)) is not None
        assert "You are using a model of type" not in caplog.text
        AutoTokenizer.from_pretrained(source)
        assert "You are using a model of type" in caplog.text
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)


# -- how families decode -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [8, 16])
def test_loaded_sdar_has_no_sub_blocks(write_source: Callable, tmp_path: Path, block_size: int) -> None:
    source, _ = write_source("sdar", block_size=block_size)
    convert(source, tmp_path / "out")
    for folder in (source, tmp_path / "out"):
        assert RelayForMaskedDiffusion.from_pretrained(folder).generation_config.sub_block_size is None


@pytest.mark.parametrize("name", FAMILIES)
def test_convert_mask_token_id_of_config_or_argument(write_source: Callable, tmp_path: Path, name: str) -> None:
    """The argument counts, then config.json, also where the family's own id is outside the vocabulary."""
    source, _ = write_source(name, tokenizer=None, mask_token_id=3)
    assert convert(source, tmp_path / "file").mask_token_id == 3
    config = json.loads((source / "config.json").read_text())
    assert RelayForMaskedDiffusion.from_pretrained(source).config.mask_token_id == 3
    del config["mask_token_id"]
    (source / "config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "argument", mask_token_id=5).mask_token_id == 5
    for folder, token in (("file", 3), ("argument", 5)):
        saved = json.loads((tmp_path / folder / "config.json").read_text())
        assert saved["mask_token_id"] == token
        assert "mask_token_id" not in saved["text_config"]


@pytest.mark.parametrize(
    ("alg", "order"),
    [("maskgit_plus", "confidence"), ("entropy", "entropy"), ("topk_margin", "margin"), ("origin", None)],
)
def test_dream_saved_by_its_own_class_converts(
    write_source: Callable, tmp_path: Path, alg: str, order: str | None
) -> None:
    """Its generation config has fields that `generate` refuses, and a temperature that transformers does not save."""
    dream = {"alg": alg, "alg_temp": None, "eps": 0.001, "steps": 4, "temperature": 0.0, "top_p": None, "top_k": 20}
    dream |= {"output_history": False, "generation_kwargs": {}, "mask_token_id": 260, "eos_token_id": 257}
    source, _ = write_source("dream", generation=dream)
    convert(source, tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out")
    options = model.generation_config
    assert (options.do_sample, options.confidence_top_k, options.eos_token_id) == (False, 20, 257)
    assert not {"alg", "alg_temp", "eps", "steps", "mask_token_id"} & options.to_dict().keys()
    expected = ("confidence_budget", "confidence", None) if order is None else ("time_schedule", order, 4)
    assert (options.unmasking_policy, options.unmasking_order, options.denoising_steps) == expected
    output = model.generate(torch.arange(5)[None], max_new_tokens=12, eos_token_id=None, return_dict_in_generate=True)
    assert int(output.denoise_forwards[0]) <= (12 if order is None else 4)


def test_dream_saved_by_its_own_class_without_top_k_converts(write_source: Callable, tmp_path: Path) -> None:
    dream = {"alg": "entropy", "alg_temp": 0.1, "steps": 512, "temperature": 0.2, "top_k": None, "output_history": True}
    source, _ = write_source("dream", generation=dream)
    convert(source, tmp_path / "out")
    options = RelayForMaskedDiffusion.from_pretrained(tmp_path / "out").generation_config
    assert (options.do_sample, options.temperature, options.confidence_top_k) == (True, 0.2, None)
    assert (options.output_history, options.denoising_steps) == (False, 512)


@pytest.mark.parametrize("uses_it", [True, False])
def test_llada_reply_ends_at_eot_id(write_source: Callable, tmp_path: Path, uses_it: bool) -> None:
    tokenizer = make_tokenizer(diffuses=True)
    tokenizer.add_tokens(["<|eot_id|>"], special_tokens=True)
    tokenizer.chat_template = "{{ messages[0].content }}" + ("<|eot_id|>" if uses_it else "")
    source, _ = write_source("llada", tokenizer=tokenizer, eos_token_id=257)
    convert(source, tmp_path / "out")
    stops = RelayForMaskedDiffusion.from_pretrained(tmp_path / "out").generation_config.eos_token_id
    assert stops == ([257, 261] if uses_it else 257)


def test_code_of_its_own_named_in_report(write_source: Callable, tmp_path: Path) -> None:
    source, _ = write_source("qwen2", auto_map={"AutoModelForCausalLM": "modeling_both_ways.Model"})
    report = convert(source, tmp_path / "out")
    assert any("`modeling_both_ways.Model`" in note and "both directions" in note for note in report.notes)


def test_generation_defaults_that_are_no_options_raise() -> None:
    config = RelayConfig(text_config=text_config(), mask_token_id=3, generation_defaults={"sub_blocks": 4})
    with pytest.raises(ValueError, match=r"`generation_defaults` name \['sub_blocks'\]"):
        RelayForMaskedDiffusion(config)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llada", {"include_qkv_bias": True}, r"no Llama, because of \{'include_qkv_bias': True\}"),
        ("llada", {"block_type": "sequential"}, "no Llama, because of"),
        ("dream", {"block_size": 32}, "only the whole-sequence model is known"),
        ("dream", {"use_mrope": True}, "`use_mrope`, which Qwen2 lacks"),
        ("qwen2", {"model_type": "llada2_moe"}, "known neither to transformers nor to this library"),
    ],
)
def test_unknown_variant_raises(write_source: Callable, name: str, fields: dict[str, Any], message: str) -> None:
    source, _ = write_source(name, **fields)
    with pytest.raises(ValueError, match=message):
        RelayForMaskedDiffusion.from_pretrained(source)


def test_llada_of_experts_raises() -> None:
    with pytest.raises(ValueError, match="no `d_model`"):
        foreign_config_to_relay({"model_type": "llada", "hidden_size": 16})
