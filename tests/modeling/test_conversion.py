"""Checkpoints of other libraries: they load, mean the same, and are saved again under our names."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.modeling.loading_families_relay import foreign_config_to_relay

from ..conftest import MASK, VOCAB_SIZE

PUBLISHED_CONFIG = {"model_type": "Fast_dLLM_Qwen", "vocab_size": 64, "num_hidden_layers": 3, "mask_token_id": 63}
OLDER_NAMES = {"use_relay": "use_loopholing", "relay_layer": "loophole_layer"}

RELOAD = """
import sys, torch, transformers, relay_hf
folder = sys.argv[1]
ids, state, prompt = (torch.load(f"{folder}/inputs.pt")[name] for name in ("ids", "state", "prompt"))
results = {}
for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"):
    model = getattr(transformers, name).from_pretrained(folder)
    with torch.no_grad():
        logits = model(ids, relay_state=state).logits
    output = model.generate(prompt, max_new_tokens=20, eos_token_id=None, return_dict_in_generate=True)
    counts = torch.stack([output.denoise_forwards, output.commit_forwards, output.prefill_forwards])
    results[name] = {"logits": logits, "tokens": output.sequences, "counts": counts}
torch.save(results, f"{folder}/results.pt")
"""


def write_checkpoint(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def published(reference: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights in the published layout."""
    folder = reference / "checkpoint"
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.fixture
def base_checkpoint(tiny_text_config: Qwen2Config, tmp_path: Path) -> tuple[Qwen2ForCausalLM, Path]:
    """A plain causal model, without any channel."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(tiny_text_config).eval()
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


def test_from_pretrained_older_names_equal(
    published: tuple, reference: Path, reference_vectors: dict[str, Tensor], tmp_path: Path
) -> None:
    config, weights = published
    older_config = {OLDER_NAMES.get(name, name): value for name, value in config.items()}
    older_weights = {name.replace("relay_layer_norm", "h_t_layer_norm"): value for name, value in weights.items()}
    assert older_config.keys() != config.keys()
    assert older_weights.keys() != weights.keys()
    older = RelayForMaskedDiffusion.from_pretrained(write_checkpoint(tmp_path / "older", older_config, older_weights))
    current = RelayForMaskedDiffusion.from_pretrained(reference / "checkpoint")
    inputs = (reference_vectors["forward.input_ids"], None, None, None, reference_vectors["forward.relay_state"])
    assert older.config.to_diff_dict() == current.config.to_diff_dict()
    with torch.no_grad():
        assert torch.equal(older(*inputs).logits, current(*inputs).logits)


def test_from_pretrained_published_channel_weights_kept(published: tuple, reference: Path) -> None:
    weights = published[1]
    model = RelayForMaskedDiffusion.from_pretrained(reference / "checkpoint")
    assert torch.equal(model.relay.norm.weight, weights["model.relay_layer_norm.weight"])
    assert torch.equal(model.relay.norm.bias, weights["model.relay_layer_norm.bias"])


def test_save_pretrained_published_checkpoint_writes_our_names(reference: Path, tmp_path: Path) -> None:
    model = RelayForMaskedDiffusion.from_pretrained(reference / "checkpoint")
    model.save_pretrained(tmp_path)
    saved, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    assert saved.keys() == dict(model.named_parameters()).keys()
    assert {name for name in saved if "relay" in name} == {"relay.norm.weight", "relay.norm.bias"}
    assert config["model_type"] == "relay"
    assert "Fast_dLLM" not in json.dumps(config)
    assert not {"use_relay", "bd_size"} & (config | config["text_config"]).keys()


def test_save_pretrained_published_checkpoint_reloads_in_fresh_process(
    reference: Path, reference_index: dict, reference_vectors: dict[str, Tensor], tmp_path: Path
) -> None:
    model = RelayForMaskedDiffusion.from_pretrained(reference / "checkpoint")
    ids, state = reference_vectors["forward.input_ids"], reference_vectors["forward.relay_state"]
    prompt = reference_vectors[f"{reference_index['cases'][0]['key']}.prompt0"][None]
    model.save_pretrained(tmp_path)
    torch.save({"ids": ids, "state": state, "prompt": prompt}, tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, capture_output=True)
    output = model.generate(prompt, max_new_tokens=20, eos_token_id=None, return_dict_in_generate=True)
    counts = torch.stack([output.denoise_forwards, output.commit_forwards, output.prefill_forwards])
    for result in torch.load(tmp_path / "results.pt").values():
        # Equal to the last bits that depend on how many threads a process has.
        torch.testing.assert_close(result["logits"], model(ids, relay_state=state).logits.detach(), atol=1e-5, rtol=0)
        assert torch.equal(result["tokens"], output.sequences)
        assert torch.equal(result["counts"], counts)


@pytest.mark.parametrize("ties", [False, True])
def test_from_pretrained_base_checkpoint_is_causal_model_in_blocks_of_one(
    tiny_text_config: Qwen2Config, tmp_path: Path, ties: bool
) -> None:
    tiny_text_config.tie_word_embeddings = ties
    base = Qwen2ForCausalLM(tiny_text_config).eval()
    base.save_pretrained(tmp_path)
    model = RelayForMaskedDiffusion.from_pretrained(tmp_path, mask_token_id=MASK, block_size=1)
    ids = torch.arange(2 * 12).reshape(2, 12) % MASK
    with torch.no_grad():
        # Ours scores the token AT a position. Tolerance: another mask, another kernel.
        torch.testing.assert_close(model(ids).logits[:, 1:], base(ids).logits[:, :-1], atol=1e-5, rtol=0)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == ties


def test_from_pretrained_base_checkpoint_without_head_prefix_loads(base_checkpoint: tuple, tmp_path: Path) -> None:
    base, _ = base_checkpoint
    base.model.save_pretrained(tmp_path / "backbone")
    model = RelayForMaskedDiffusion.from_pretrained(tmp_path / "backbone", mask_token_id=MASK)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(("relay_init", "weight"), [("zeros", 0.0), ("ones", 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_base_checkpoint_fresh_channel_initialised(
    base_checkpoint: tuple, relay_init: str, weight: float, dtype: torch.dtype
) -> None:
    options = {"mask_token_id": MASK, "relay_init": relay_init, "dtype": dtype}
    model = RelayForMaskedDiffusion.from_pretrained(base_checkpoint[1], **options)
    assert torch.equal(model.relay.norm.weight, torch.full((16,), weight))
    assert torch.equal(model.relay.norm.bias, torch.zeros(16))
    assert model.lm_head.weight.dtype == dtype


def test_from_pretrained_bfloat16_keeps_saved_channel_in_float32(make_model: Callable, tmp_path: Path) -> None:
    model = make_model(open_channel=True)
    model.save_pretrained(tmp_path)
    loaded = RelayForMaskedDiffusion.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.relay.norm.weight.dtype == loaded.relay.norm.bias.dtype == torch.float32
    assert torch.equal(loaded.relay.norm.weight, model.relay.norm.weight)
    others = {p.dtype for name, p in loaded.named_parameters() if not name.startswith("relay.")}
    assert others == {torch.bfloat16}


def test_from_pretrained_auto_class_options_same_as_direct(make_model: Callable, tmp_path: Path) -> None:
    """The Auto classes read the file themselves; options must act there as they do here."""
    make_model(open_channel=True).save_pretrained(tmp_path)
    options, ids = {"relay_readout": "pre_norm", "block_size": 4}, torch.arange(16)[None]
    automatic = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    direct = RelayForMaskedDiffusion.from_pretrained(tmp_path, **options)
    assert automatic.config.to_diff_dict() == direct.config.to_diff_dict()
    assert torch.equal(automatic(ids).relay_state, direct(ids).relay_state)


def test_from_pretrained_auto_class_bad_option_raises(make_model: Callable, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"outside the vocabulary of {VOCAB_SIZE}"):
        AutoModelForCausalLM.from_pretrained(tmp_path, mask_token_id=VOCAB_SIZE)


@pytest.mark.parametrize(("layer", "readout"), [(-1, "post_norm"), (2, "pre_norm"), (-2, "pre_norm"), (0, "pre_norm")])
def test_foreign_config_relay_layer_only_minus_one_is_behind_final_norm(layer: int, readout: str) -> None:
    config = RelayConfig(**foreign_config_to_relay({**PUBLISHED_CONFIG, "use_relay": True, "relay_layer": layer}))
    assert (config.relay_layer, config.relay_readout) == (layer, readout)


@pytest.mark.parametrize(
    ("use_relay", "channel", "first_state"),
    [(True, "layer_norm", "none"), (None, "layer_norm", "zeros"), (False, "none", "zeros")],
)
def test_foreign_config_use_relay_decides_channel(use_relay: bool | None, channel: str, first_state: str) -> None:
    """A trained channel decodes as published; a checkpoint from before the relay gets a fresh one."""
    stated = {} if use_relay is None else {"use_relay": use_relay}
    ours = foreign_config_to_relay({**PUBLISHED_CONFIG, **stated})
    assert (ours["relay_channel"], ours["relay_initial_state"]) == (channel, first_state)


def test_foreign_config_without_model_type_raises() -> None:
    with pytest.raises(ValueError, match="no `model_type`"):
        foreign_config_to_relay({"hidden_size": 16})


def test_from_pretrained_base_checkpoint_without_mask_token_raises(base_checkpoint: tuple) -> None:
    with pytest.raises(ValueError, match="`mask_token_id` is not set"):
        RelayForMaskedDiffusion.from_pretrained(base_checkpoint[1])
