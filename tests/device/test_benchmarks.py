"""The scripts that are meant for a GPU run on the test device, so that no second of a GPU is spent on typos."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from . import fakegpu

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


def test_text_study_trains_and_evaluates_on_the_device(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import text_gpu
    from text_workload import Balances

    fakegpu.default_to(fakegpu.NAME, monkeypatch)
    monkeypatch.setattr(Balances, "thresholds", (0.9,))
    evaluate, places = Balances.evaluate, set()

    def evaluate_there(workload: Any, model: Any, *rest: Any, **options: Any) -> dict[str, float]:
        places.add(model.device.type)
        return evaluate(workload, model, *rest, **options)

    monkeypatch.setattr(Balances, "evaluate", evaluate_there)
    monkeypatch.setattr(text_gpu, "ARMS", ("start", "relay, W = 2"))
    sizes = {"hidden_size": 32, "layers": 1, "size": 4, "batch_size": 2, "warmup_steps": 2, "steps": 1}
    text_gpu.run(tmp_path, 1, 60.0, sizes | {"test_puzzles": 4})
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]
    assert [line["arm"] for line in lines] == ["start", "relay, W = 2"]
    assert places == {fakegpu.NAME}
    text_gpu.run(tmp_path, 2, 0.0, sizes | {"test_puzzles": 4})
    assert "stopped" in capsys.readouterr().out
    with pytest.raises(ValueError, match="choose another folder"):
        text_gpu.run(tmp_path, 1, 60.0, sizes)
