"""`relay-hf train` on a base that bitsandbytes quantises, which has kernels for CPUs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, Qwen2ForCausalLM

from relay_hf import RelayTrainer
from relay_hf.cli import main
from relay_hf.commands import train_arguments

from ..conftest import text_config
from ..trainers.text import build_text_model, build_tokenizer

# As wide as the kernels want it.
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model whose channel is open, by numbers that bf16 does not have."""
    model = build_text_model(text=SIZES)
    torch.nn.init.normal_(model.relay.norm.weight, std=0.3)
    model.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[RelayTrainer]:
    """Those that the command made, once they have trained."""
    pytest.importorskip("bitsandbytes")
    made: list[RelayTrainer] = []
    run = RelayTrainer.train

    def train(self: RelayTrainer, *args: Any, **kwargs: Any) -> Any:
        made.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(RelayTrainer, "train", train)
    return made


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_gets_adapters_channel_and_a_merged_model(
    recipe: Callable[..., Path], base: Path, tmp_path: Path, trainers: list[RelayTrainer], bits: int
) -> None:
    path = recipe(model_name_or_path=str(base), use_peft=True, lora_r=2, dtype="bfloat16")
    assert main(["train", "--config", str(path), f"--load_in_{bits}bit", "true"]) == 0
    model = trainers[0].model.get_base_model()
    assert getattr(model, f"is_loaded_in_{bits}bit")
    kept, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "run" / "merged" / "model.safetensors")
    channel = {name: p for name, p in model.relay.named_parameters() if p.requires_grad}
    assert {p.dtype for p in channel.values()} == {torch.float32}
    assert all(not torch.equal(p, kept[f"relay.{name.split('.', 2)[2]}"]) for name, p in channel.items())
    # The adapter is merged into the base in full precision, so that the rest of it is what it was.
    assert merged.keys() == kept.keys()
    assert {merged[name].dtype for name in merged if "relay" in name} == {torch.float32}
    same = {name for name, tensor in merged.items() if torch.equal(tensor, kept[name].to(tensor.dtype))}
    assert {name.split(".")[-2] for name in kept.keys() - same} == {"norm", "q_proj", "v_proj"}
    alone = AutoModel.from_pretrained(tmp_path / "run", dtype="bfloat16").merge_and_unload().state_dict()
    assert all(torch.equal(alone[name].to(tensor.dtype), tensor) for name, tensor in merged.items())


def test_resumed_quantised_run_equals_an_uninterrupted_one(
    recipe: Callable[..., Path], base: Path, tmp_path: Path, trainers: list[RelayTrainer]
) -> None:
    options = {"use_peft": True, "load_in_4bit": True, "save_merged": False, "save_strategy": "steps", "save_steps": 1}
    path = recipe(model_name_or_path=str(base), **options)
    assert main(["train", "--config", str(path)]) == 0
    resumed = ["--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(tmp_path / "run/checkpoint-1")]
    assert main(["train", "--config", str(path), *resumed]) == 0
    left, right = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "again"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_quantised_plain_decoder_becomes_a_relay_model(
    recipe: Callable[..., Path], tmp_path: Path, trainers: list[RelayTrainer]
) -> None:
    torch.manual_seed(0)
    Qwen2ForCausalLM(text_config(vocab_size=259, **SIZES)).save_pretrained(tmp_path / "plain")
    build_tokenizer().save_pretrained(tmp_path / "plain")
    path = recipe(model_name_or_path=str(tmp_path / "plain"), use_peft=True, load_in_4bit=True, mask_token_id=258)
    assert main(["train", "--config", str(path)]) == 0
    assert AutoModel.from_pretrained(tmp_path / "run" / "merged").config.mask_token_id == 258


def test_saved_adapter_goes_on_learning_on_a_quantised_base(
    recipe: Callable[..., Path], base: Path, tmp_path: Path, trainers: list[RelayTrainer]
) -> None:
    first = recipe(model_name_or_path=str(base), use_peft=True, save_merged=False)
    assert main(["train", "--config", str(first)]) == 0
    second = recipe(model_name_or_path=str(tmp_path / "run"), output_dir=str(tmp_path / "more"), load_in_4bit=True)
    assert main(["train", "--config", str(second)]) == 0
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "more"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before if "lora_A" in name)


def test_summary_counts_the_weights_that_were_packed(
    recipe: Callable[..., Path], base: Path, trainers: list[RelayTrainer], capsys: pytest.CaptureFixture
) -> None:
    said = []
    for bits in ("false", "true"):
        path = recipe(model_name_or_path=str(base), use_peft=True, dry_run=True)
        assert main(["train", "--config", str(path), "--load_in_4bit", bits]) == 0
        said.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  parameters")))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True}, "`load_in_4bit` freezes the model's weights, so that only adapters can learn"),
        ({"load_in_8bit": True}, "add `--use_peft true`"),
        ({"load_in_4bit": True, "load_in_8bit": True, "use_peft": True}, "8 bit and 4 bit precision at the same time"),
        ({"load_in_4bit": True, "use_peft": True, "dtype": "auto"}, "`dtype=auto` does not name what 4-bit weights"),
        ({"use_peft": True, "bnb_4bit_quant_type": "fp4"}, "`bnb_4bit_quant_type=fp4` has no effect without"),
        ({"load_in_8bit": True, "use_bnb_nested_quant": True}, "`use_bnb_nested_quant=True` has no effect without"),
        ({"load_in_4bit": True, "use_peft": True, "bnb_4bit_quant_storage": "bits"}, "`bnb_4bit_quant_storage`"),
    ],
)
def test_bad_options_of_quantisation_are_one_sentence_and_exit_code_2(
    options: dict[str, Any], message: str, recipe: Callable[..., Path], refuse: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    assert message in refuse("train", "--config", recipe(**options))
    assert not (tmp_path / "run").exists()


def test_missing_bitsandbytes_is_one_sentence(
    recipe: Callable[..., Path], refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_arguments, "is_bitsandbytes_available", lambda: False)
    path = recipe(load_in_4bit=True, use_peft=True)
    assert "`load_in_4bit` needs bitsandbytes: run `pip install bitsandbytes`" in refuse("train", "--config", path)
