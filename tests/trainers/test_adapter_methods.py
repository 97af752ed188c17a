"""Adapters of every kind: trained, loaded by AutoModel, trained and saved again, merged; or refused at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AdaptionPromptConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from relay_hf import RelayForMaskedDiffusion
from relay_hf.modeling.loading_adapters_relay import loaded_adapter
from relay_hf.trainers import RelayTrainer

from .conftest import MASK, build_model

MakeTrainer = Callable[..., RelayTrainer]
IDS = torch.tensor([[5, 6, 7, 8, 9, MASK, MASK, MASK]])
LAYERS = ["q_proj", "v_proj", "down_proj"]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **options})


METHODS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "embeddings": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "saved": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": lambda: lora(trainable_token_indices={"embed_tokens": [MASK]}),
    "no_task": lambda: lora(task_type=None),
    "ia3": lambda: IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "vera": lambda: peft.VeraConfig(target_modules=LAYERS),
    "loha": lambda: peft.LoHaConfig(target_modules=LAYERS, r=2),
    "lokr": lambda: peft.LoKrConfig(target_modules=LAYERS, r=2),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=LAYERS, init_r=4, target_r=2, total_step=100),
    "oft": lambda: peft.OFTConfig(target_modules=LAYERS, oft_block_size=4),
}


@pytest.fixture
def base(tmp_path: Path) -> str:
    build_model().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of a model, or a PeftModel, with a state that says something."""
    state = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=IDS, relay_state=state).logits


@pytest.mark.parametrize("method", METHODS)
def test_adapter_is_the_same_model_in_every_life(
    make_trainer: MakeTrainer, tmp_path: Path, base: str, method: str
) -> None:
    trainer = make_trainer(
        base,
        output_dir=tmp_path / "one",
        max_steps=1,
        learning_rate=0.1,
        trainer_options={"peft_config": METHODS[method]()},
    )
    trainer.train()
    trainer.save_model()
    live = logits(trainer.model)
    assert not torch.allclose(live, logits(RelayForMaskedDiffusion.from_pretrained(base)), atol=1e-2)
    loaded = AutoModel.from_pretrained(tmp_path / "one")
    assert isinstance(loaded, RelayForMaskedDiffusion)
    torch.testing.assert_close(logits(loaded), live, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "copy")
    torch.testing.assert_close(logits(AutoModel.from_pretrained(tmp_path / "copy")), live, rtol=1e-4, atol=1e-4)

    before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    second = make_trainer(
        loaded, output_dir=tmp_path / "two", max_steps=1, learning_rate=0.1, save_strategy="steps", save_steps=1
    )
    second.train()
    moved = {name for name, p in loaded.named_parameters() if not torch.equal(p, before[name])}
    assert any("relay" in name for name in moved)
    assert any("relay" not in name for name in moved)
    assert all(before[name].dtype == torch.float32 for name in moved)
    second.save_model()
    live = logits(second.model)
    for folder in (tmp_path / "two", tmp_path / "two" / "checkpoint-1"):
        torch.testing.assert_close(logits(AutoModel.from_pretrained(folder)), live, rtol=1e-4, atol=1e-4)
    merged = AutoModel.from_pretrained(tmp_path / "two").merge_and_unload()
    torch.testing.assert_close(logits(merged), live, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    whole = AutoModel.from_pretrained(tmp_path / "merged")
    assert loaded_adapter(whole) is None
    torch.testing.assert_close(logits(whole), live, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "'PROMPT_TUNING'` learns a prompt"),
        (peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "'PREFIX_TUNING'` learns a prompt"),
        (peft.PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "'P_TUNING'` learns a prompt"),
        (AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"), "learns a prompt"),
        (peft.LNTuningConfig(target_modules=["norm"]), "leaves the channel behind"),
        (peft.TrainableTokensConfig(token_indices=[MASK]), "has no `modules_to_save`"),
        (lora(init_lora_weights="pissa_niter_4"), "changes the base in a way that loading the adapter cannot repeat"),
        (lora(layer_replication=[[0, 2], [1, 2]]), "`layer_replication` changes what a pass"),
        (lora(alora_invocation_tokens=[3]), "`alora_invocation_tokens` changes what a pass"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_adapter_that_cannot_work_raises_from_the_constructor(
    make_trainer: MakeTrainer, config: PeftConfig, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        make_trainer(trainer_options={"peft_config": config})


def test_peft_model_of_prompts_raises(make_trainer: MakeTrainer) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", token_dim=16, num_layers=2)
    config.num_attention_heads = 2
    with pytest.raises(ValueError, match="learns a prompt in front of the text"):
        make_trainer(get_peft_model(build_model(), config))


@pytest.fixture
def adapter(make_trainer: MakeTrainer, tmp_path: Path, base: str) -> Path:
    trainer = make_trainer(base, output_dir=tmp_path / "adapter", trainer_options={"peft_config": lora(use_dora=True)})
    trainer.save_model()
    return tmp_path / "adapter"


@pytest.mark.parametrize("part", ["lora_magnitude_vector", "lora_A", "relay.norm.bias"])
def test_adapter_without_a_part_raises(adapter: Path, part: str) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if part in name)
    save_file({key: t for key, t in tensors.items() if key != name}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"lacks \['{name}'\]: save it again"):
        AutoModel.from_pretrained(adapter)


@pytest.mark.parametrize("name", ["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", "other"])
def test_adapter_with_a_part_too_many_raises(adapter: Path, name: str) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({**tensors, name: torch.zeros(2, 16)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"has, beside what belongs to it, \['.*{name[-20:]}"):
        AutoModel.from_pretrained(adapter)


def test_adapter_of_another_size_raises(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: torch.zeros(2, 17)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit its base"):
        AutoModel.from_pretrained(adapter)


def test_adapter_that_peft_alone_saved_loads_on_its_relay_base(adapter: Path, base: str) -> None:
    expected = logits(AutoModel.from_pretrained(adapter))
    (adapter / "config.json").unlink()
    for loader in (AutoModel, RelayForMaskedDiffusion):
        assert torch.equal(logits(loader.from_pretrained(adapter)), expected)


def test_adapter_without_base_raises(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(output_dir=tmp_path / "adapter", trainer_options={"peft_config": lora()})
    trainer.save_model()
    with pytest.raises(ValueError, match="holds an adapter that names no base"):
        AutoModel.from_pretrained(tmp_path / "adapter")
    model = build_model()
    model.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(model), logits(trainer.model))


def test_second_adapter_raises(make_trainer: MakeTrainer, adapter: Path) -> None:
    with pytest.raises(ValueError, match="The model has an adapter, and `peft_config` asks for another"):
        make_trainer(str(adapter), trainer_options={"peft_config": lora()})
    with pytest.raises(ValueError, match="no adapter that was loaded"):
        build_model().merge_and_unload()


def test_frozen_adapter_raises(make_trainer: MakeTrainer, adapter: Path, base: str) -> None:
    model = PeftModel.from_pretrained(RelayForMaskedDiffusion.from_pretrained(base), adapter)
    with pytest.raises(ValueError, match="The adapter is frozen: load it with `AutoModel"):
        make_trainer(model, objective="masked")
