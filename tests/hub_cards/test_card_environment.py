"""Versions, hardware, and what a card may import."""

import ast
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import relay_hf.hub_cards as hub_cards
from relay_hf.hub_cards import environment


def test_versions_are_those_installed():
    found = environment.versions()
    assert next(iter(found)) == "python"
    assert found["torch"] == version("torch")
    assert found["transformers"] == version("transformers")


def test_versions_leave_out_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "a-package-that-nobody-has"))
    assert list(environment.versions()) == ["python", "torch"]


def test_hardware_counts_gpus_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert environment.hardware() == "2 x NVIDIA H100, 16 CPU cores"


def test_hardware_without_torch_names_the_cpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    assert environment.hardware() == "1 CPU core"


def test_hub_cards_import_only_the_standard_library_and_the_hub():
    allowed = sys.stdlib_module_names | {"huggingface_hub"}
    for path in Path(hub_cards.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                assert {name.name.split(".")[0] for name in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and node.module.split(".")[0] in allowed), path
