"""What a run ran on. The packages that it names are asked, not imported, so a card can be written without torch."""

import os
import platform
from collections import Counter
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "relay_hf",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "huggingface_hub",
)


def versions() -> dict[str, str]:
    """Package -> installed version, Python first; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def hardware() -> str:
    """One line: the GPUs that torch sees, and the CPU cores this process may use ("1 x NVIDIA H100, 16 CPU cores")."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [f"{count} x {name}" for name, count in Counter(_gpu_names()).items()]
    return ", ".join([*parts, f"{cores} CPU core{'s' if cores != 1 else ''}"])


def _gpu_names() -> list[str]:
    try:
        import torch
    except ImportError:
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
