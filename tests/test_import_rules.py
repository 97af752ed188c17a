"""What `modeling/` may import; and that transformers' Hub copier carries it to a process without this package."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import relay_hf

MODELING = Path(relay_hf.__file__).parent / "modeling"
# `__init__.py` does not travel.
TRAVELLERS = sorted(path for path in MODELING.glob("*.py") if path.name != "__init__.py")
ALLOWED = {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)
RELATIVE_LINE = re.compile(r"^\s*(from\s+\.|import\s+\.)", re.MULTILINE)


@pytest.mark.parametrize("path", TRAVELLERS, ids=lambda path: path.name)
def test_modeling_file_imports_only_what_travels(path: Path) -> None:
    siblings = {other.stem for other in TRAVELLERS}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert (node.level, node.module in siblings) == (1, True), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in ALLOWED, ast.unparse(node)


@pytest.mark.parametrize("path", TRAVELLERS, ids=lambda path: path.name)
def test_modeling_file_no_relative_import_line_inside_a_string(path: Path) -> None:
    """The copier searches text, so it would take one in a docstring for an import."""
    strings = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
    assert not [text for text in strings if isinstance(text, str) and RELATIVE_LINE.search(text)]


def test_modeling_imported_alone_leaves_the_rest_unimported() -> None:
    code = "import sys, relay_hf.modeling; print(sorted(name for name in sys.modules if name.startswith('relay_hf.')))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "relay_hf.modeling.modeling_relay" in loaded
    assert not re.findall(r"relay_hf\.(?!modeling|version|startup)\w+", loaded)


WRITE = """
import sys, torch
from transformers import Qwen2Config
from relay_hf import RelayConfig, RelayForMaskedDiffusion
RelayConfig.register_for_auto_class()
RelayForMaskedDiffusion.register_for_auto_class("AutoModelForCausalLM")
sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
text = Qwen2Config(**sizes, num_hidden_layers=2, initializer_range=0.5)
config = RelayConfig(text_config=text, block_size=8, mask_token_id=63, token_shift=True, relay_init="ones")
config.auto_map = {name: "modeling_relay.RelayForMaskedDiffusion" for name in ("AutoModel", "AutoModelForMaskedLM")}
torch.manual_seed(0)
model = RelayForMaskedDiffusion(config).eval()
model.save_pretrained(sys.argv[1])
"""

RUN = """
import torch
def results(model):
    ids = torch.arange(32).reshape(2, 16).index_fill(1, torch.tensor([3, 11]), 63)
    with torch.no_grad():
        logits = model(ids, relay_state=torch.ones(2, 16, 16)).logits
    return logits, model.generate(ids[:, 4:11], max_new_tokens=12, unmasking_threshold=0.3)
"""

READ = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "relay_hf":
            raise ImportError("hidden")
sys.meta_path.insert(0, Hide())
import transformers
for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"):
    model = getattr(transformers, name).from_pretrained(sys.argv[1], trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    torch.save(results(model), f"{sys.argv[1]}/{name}.pt")
assert not any(name.startswith("relay_hf") for name in sys.modules)
"""


def test_hub_copier_carries_model_to_process_without_package(tmp_path: Path) -> None:
    """In processes of its own: registering for an Auto class marks every later save of this one."""
    import torch

    folder, environment = tmp_path / "model", {**os.environ, "HF_HOME": str(tmp_path / "home")}
    save = f"{RUN}{WRITE}torch.save(results(model), sys.argv[1] + '/here.pt')"
    for code, options in ((save, []), (RUN + READ, ["-I"])):
        command = [sys.executable, *options, "-c", code, str(folder)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in TRAVELLERS}
    logits, tokens = torch.load(folder / "here.pt")
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"):
        there = torch.load(folder / f"{name}.pt")
        assert torch.equal(there[0], logits)
        assert torch.equal(there[1], tokens)
