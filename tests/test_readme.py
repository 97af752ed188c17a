"""The README's code runs as it stands, with a tiny model and local data in place of the Hub's."""

import re
from pathlib import Path

import datasets
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_readme_ten_lines_load_train_and_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tokenizer: object
) -> None:
    (code,) = PYTHON
    base = tmp_path / "Qwen" / "Qwen2.5-0.5B"
    config = Qwen2Config(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(base)  # as most published checkpoints are
    tokenizer.save_pretrained(base)
    rows = datasets.Dataset.from_list([{"prompt": "1 + 1 = ", "completion": "2"}] * 16)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("max_steps=200", "max_steps=2, use_cpu=True, report_to=[]"), names)
    assert {p.dtype for p in names["trainer"].model.parameters()} == {torch.float32}
    assert re.search(r"tensor\(\[\d+\]\)", capsys.readouterr().out)
    assert (tmp_path / "my-relay" / "model.safetensors").exists()


def test_readme_links_and_pictures_exist() -> None:
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert linked
    for target in linked:
        assert (Path(__file__).parents[1] / target).exists(), target


def test_readme_commands_are_targets_of_the_makefile() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
