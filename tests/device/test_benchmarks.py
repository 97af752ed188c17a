"""The scripts that are meant for a GPU run on the test device, so that no second of a GPU is spent on typos."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# What the test device cannot do, in the words of the script.
MISSING = (
    "has no graphs of kernels",
    "has no choice of kernels",
    "Could not run 'aten::",
    "knows no time",
    "`cache_implementation=",
)


def run_script(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(BENCHMARKS / "accelerator.py"), "--device", "fakegpu", "--tiny", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_accelerator_script_measures_every_part(device: torch.device) -> None:
    environment, *parts = run_script()
    assert environment["device"] == "fakegpu"
    assert [part["part"] for part in parts] == list("abcdefg")
    for part in parts:
        assert part["found"], part
        assert "error" not in part, part
        failures = [value for value in part["found"].values() if isinstance(value, str)]
        assert all(any(reason in failure for reason in MISSING) for failure in failures), failures
    assert parts[-1]["found"]["tokens equal"] is True


def test_accelerator_part_over_its_limit_keeps_what_it_found(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import accelerator

    def endless(bench: Any) -> accelerator.Findings:
        yield "first", 1
        time.sleep(60)

    monkeypatch.setitem(accelerator.PARTS, "a", (endless, 1))
    result = accelerator.run_part("a", accelerator.Bench("cpu", tiny=True))
    assert result["found"] == {"first": 1}
    assert "1 s" in result["error"]


def test_accelerator_part_that_raises_says_so(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import accelerator

    def broken(bench: Any) -> accelerator.Findings:
        yield "first", accelerator.attempt(lambda: 1 / 0)
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(accelerator.PARTS, "a", (broken, 10))
    result = accelerator.run_part("a", accelerator.Bench("cpu", tiny=True))
    assert result["found"] == {"first": "ZeroDivisionError: division by zero"}
    assert result["error"] == "RuntimeError: no such kernel"
