"""Builds and loads the stand-in for a GPU of `fakegpu.cpp`, and counts what a GPU would wait for, copy and launch.

    python -m tests.device.fakegpu          # builds it: half a minute, needs g++

    device = fakegpu.load()
    with fakegpu.count() as counts:
        model.to(device).generate(ids.to(device))
    print(counts.report())

A device cannot be unloaded, and libraries choose it wherever they choose a GPU, so it is loaded only in processes that
exist for it.
"""

import ctypes
import functools
import hashlib
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor

import relay_hf

NAME = "fakegpu"
SOURCE = Path(__file__).with_suffix(".cpp")
PACKAGE = f"{Path(relay_hf.__file__).parent}/"
HOW_TO_BUILD = "run `make test-device`, which builds it in half a minute"


# -- building ---------------------------------------------------------------------------------------------------------


def library() -> Path:
    """Where the built device is: a folder of its own for each version of torch and of the source."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    return SOURCE.parent / "build" / f"torch-{torch.__version__}-{digest}" / "fakegpu.so"


def missing() -> str:
    """What keeps the device from being loaded, in one sentence; empty if nothing does."""
    if library().exists():
        return ""
    if shutil.which("g++") is None:
        return f"The test device is not built, and there is no g++ to build it: install g++, then {HOW_TO_BUILD}."
    return f"The test device is not built: {HOW_TO_BUILD}."


def build() -> Path:
    """Compiles the device, unless it is there.

    Raises:
        RuntimeError: there is no g++, or it fails.
    """
    target = library()
    if target.exists():
        return target
    if shutil.which("g++") is None:
        raise RuntimeError(missing())
    target.parent.mkdir(parents=True, exist_ok=True)
    torch_folder, unfinished = Path(torch.__file__).parent, target.with_suffix(".unfinished")
    include = torch_folder / "include"
    headers = (include, include / "torch/csrc/api/include", sysconfig.get_paths()["include"])
    command = [
        "g++", "-O1", "-std=c++20", "-fPIC", "-shared", "-w", *(f"-I{folder}" for folder in headers), str(SOURCE),
        "-o", str(unfinished), f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10",
        f"-Wl,-rpath,{torch_folder / 'lib'}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"g++ could not build the test device: {result.stderr[-3000:]}")
    return unfinished.rename(target)


# -- loading ----------------------------------------------------------------------------------------------------------


class DeviceModule(ModuleType):
    """`torch.fakegpu`, with the functions of `torch.cuda` that torch, transformers and accelerate call."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def get_device_name(self, device: Any = None) -> str:
        return "a stand-in for a GPU, in host memory"

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed(self, seed: int) -> None:
        torch.ops.fakegpu.seed_generator(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.ops.fakegpu.generator_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.ops.fakegpu.set_generator_state(state)

    def get_rng_state_all(self) -> list[Tensor]:
        return [self.get_rng_state()]

    def set_rng_state_all(self, states: list[Tensor]) -> None:
        self.set_rng_state(states[0])

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def synchronize(self, device: Any = None) -> None:
        _hear("wait", "synchronize device")

    def empty_cache(self) -> None:
        pass

    def current_stream(self, device: Any = None) -> None:
        return None

    def memory_allocated(self, device: Any = None) -> int:
        """Bytes that live on the device."""
        return torch.ops.fakegpu.live_bytes()

    def max_memory_allocated(self, device: Any = None) -> int:
        """Most bytes that have lived on the device since `reset_peak_memory_stats`."""
        return torch.ops.fakegpu.peak_bytes()

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        torch.ops.fakegpu.reset_peak()


@functools.cache
def load() -> torch.device:
    """Loads the device into this process, for good.

    Raises:
        RuntimeError: it is not built.
    """
    if problem := missing():
        raise RuntimeError(problem)
    torch.ops.load_library(library())
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, DeviceModule(f"torch.{NAME}"))
    torch.utils.generate_methods_for_privateuse1_backend()
    ctypes.PyDLL(str(library())).fakegpu_start(ctypes.py_object(_hear))
    return torch.device(NAME, 0)


def default_to(name: str, patch: pytest.MonkeyPatch) -> None:
    """Makes accelerate, which decides once per process, decide anew for a device; or for the CPU, by the name "cpu".

    Until `patch` undoes it, the libraries also believe that there is bf16, of which they ask devices of fixed names.
    """
    patch.setenv("ACCELERATE_TORCH_DEVICE", name)
    patch.setattr(PartialState, "_shared_state", {})
    patch.setattr(AcceleratorState, "_shared_state", {})
    patch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    patch.setattr("accelerate.accelerator.is_bf16_available", lambda *arguments, **options: True)


# -- counting ---------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What the device was asked for.

    Args:
        waits: times the host waited for the device, by operation and call site.
        copies: copies from the host, by operation and call site.
        operations: launches by the name of the operation; views launch nothing, attention is one in each direction.
    """

    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)

    @property
    def launches(self) -> int:
        return self.operations.total()

    def report(self) -> str:
        """One line of totals, then one for each call site."""
        lines = [f"{self.waits.total()} waits, {self.copies.total()} copies to the device, {self.launches} launches"]
        for kind, sites in (("wait", self.waits), ("copy", self.copies)):
            lines += [f"{number:6d} {kind}  {site}" for site, number in sites.most_common()]
        return "\n".join(lines)


_counting: list[Counts] = []


@contextmanager
def count() -> Iterator[Counts]:
    """Counts what happens inside; its numbers of launches are there at the end."""
    counts, before = Counts(), Counter(torch.ops.fakegpu.launches())
    _counting.append(counts)
    try:
        yield counts
    finally:
        _counting[:] = [other for other in _counting if other is not counts]
        counts.operations = Counter(torch.ops.fakegpu.launches()) - before


def _hear(kind: str, operation: str) -> None:
    if not _counting:
        return
    site = f"{operation} at {_site(sys._getframe().f_back)}"
    for counts in _counting:
        (counts.waits if kind == "wait" else counts.copies)[site] += 1


def _site(frame: FrameType | None) -> str:
    """The innermost line of relay_hf, and that of the library which it called; a backward pass has neither."""
    ours = outside = ""
    while frame is not None and not ours:
        path = frame.f_code.co_filename
        line = f"{path.split('site-packages/')[-1]}:{frame.f_lineno} {frame.f_code.co_name}"
        if path != __file__ and "/torch/" not in path:
            outside = outside or line
        if path.startswith(PACKAGE):
            ours = f"relay_hf/{path.removeprefix(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    if not outside:
        return "the backward pass"
    return ours if ours and outside.endswith(ours) else f"{ours or 'no line of relay_hf'}, through {outside}"


if __name__ == "__main__":
    print(build())
