"""QLoRA: adapters and channel on a backbone that bitsandbytes (it runs on CPUs, too) or torchao quantised."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, BitsAndBytesConfig

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.trainers import RelayTrainer

from ..conftest import text_config
from .conftest import MASK, VOCAB_SIZE

MakeTrainer = Callable[..., RelayTrainer]
IDS = torch.tensor([[5, 6, 7, 8, 9, MASK, MASK, MASK]])


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base as wide as the kernels want it, with a channel of numbers that bf16 does not have."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    text = text_config(vocab_size=VOCAB_SIZE, **sizes)
    model = RelayForMaskedDiffusion(RelayConfig(text_config=text, block_size=4, mask_token_id=MASK, token_shift=True))
    torch.nn.init.normal_(model.relay.norm.weight, std=0.3)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path, bits: int) -> RelayForMaskedDiffusion:
    pytest.importorskip("bitsandbytes")
    options: Any = {"load_in_4bit": True} if bits == 4 else {"load_in_8bit": True}
    return RelayForMaskedDiffusion.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32
    )


@pytest.mark.parametrize("way", ["peft_config", "peft_model"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_adapters_and_channel_learn(
    make_trainer: MakeTrainer, tmp_path: Path, folder: Path, bits: int, way: str
) -> None:
    model: Any = load(folder, bits)
    precise = model.relay.norm.weight.detach().clone()
    options = {"trainer_options": {"peft_config": lora()}} if way == "peft_config" else {}
    if way == "peft_model":
        config = lora()
        config.modules_to_save = ["relay"]
        model = get_peft_model(model, config)
    trainer = make_trainer(model, output_dir=tmp_path / "out", max_steps=2, learning_rate=1e-2, **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    learns = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    channel = {name: dtype for name, dtype in learns.items() if "relay" in name}
    assert set(channel.values()) == {torch.float32}
    assert torch.equal(before[next(name for name in channel if name.endswith("weight"))], precise)
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(learns)
    trainer.save_model()
    loaded = AutoModel.from_pretrained(
        tmp_path / "out", quantization_config=model.config.quantization_config, dtype=torch.float32
    )
    saved = dict(loaded.named_parameters())
    for name, parameter in trainer.model.get_base_model().named_parameters():
        assert torch.equal(saved[name].float(), parameter.float()), name
    # The kernels of evaluation, which CPUs have for four bits, compute in bf16.
    live = trainer.model.train()(input_ids=IDS).logits
    torch.testing.assert_close(loaded.train()(input_ids=IDS).logits, live, rtol=0.01, atol=0.2)
    loaded.eval()
    assert MASK not in loaded.generate(IDS[:, :4], max_new_tokens=4)
    # The base's own files are not quantised.
    whole = AutoModel.from_pretrained(tmp_path / "out", dtype="float32")
    assert {p.dtype for p in whole.parameters()} == {torch.float32}


def test_adapter_loaded_on_a_quantised_base_goes_on_learning(
    make_trainer: MakeTrainer, tmp_path: Path, folder: Path
) -> None:
    model = load(folder, 4)
    make_trainer(model, output_dir=tmp_path / "one", trainer_options={"peft_config": lora()}).save_model()
    loaded = AutoModel.from_pretrained(
        tmp_path / "one", quantization_config=model.config.quantization_config, dtype=torch.float32
    )
    trainer = make_trainer(loaded, max_steps=1, learning_rate=1e-2)
    assert isinstance(trainer.model, PeftModel)
    before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    trainer.train()
    moved = {name for name, p in loaded.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora_B" in name for name in moved)
    assert {p.dtype for name, p in loaded.named_parameters() if name in moved and "relay" in name} == {torch.float32}


def test_quantised_base_without_adapters_raises(make_trainer: MakeTrainer, folder: Path) -> None:
    with pytest.raises(
        ValueError, match="weights are quantised, and cannot be trained themselves: pass a `peft_config`"
    ):
        make_trainer(load(folder, 8))


def test_base_quantised_by_torchao_learns(make_trainer: MakeTrainer, folder: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = RelayForMaskedDiffusion.from_pretrained(folder)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="weights are quantised"):
        make_trainer(model)
    # One position a step, so that a second step shows what the channel's weight does.
    options = {"max_steps": 2, "learning_rate": 1e-2, "unmasking_threshold": 1.0}
    trainer = make_trainer(model, **options, trainer_options={"peft_config": lora()})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    assert {name for name, value in before.items() if torch.equal(parameters[name], value)} == set()
