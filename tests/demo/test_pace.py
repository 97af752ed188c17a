"""Threads by what is free, and a study that becomes smaller where steps are slow."""

import os
from pathlib import Path

import psutil
import pytest
import torch

from relay_hf.demo import pace
from relay_hf.demo.arguments import DemoArguments
from relay_hf.demo.pace import cpu_quota, fit_to_machine, free_cores, passes, threads_for


@pytest.mark.parametrize(
    ("busy", "allowed", "quota", "free"),
    [
        ([0.0, 0.0], {0, 1}, None, 2),
        ([12.0, 20.0], {0, 1}, None, 2),  # what every machine does beside
        ([100.0, 10.0], {0, 1}, None, 1),
        ([100.0, 100.0], {0, 1}, None, 1),
        ([0.0] * 8, {2, 3, 4}, None, 3),
        ([100.0, 0.0, 0.0, 0.0], {0, 1}, None, 1),
        ([0.0] * 8, set(range(8)), "150000 100000", 2),
        ([0.0] * 8, set(range(8)), "50000 100000", 1),
        ([0.0] * 8, set(range(8)), "max 100000", 8),
    ],
)
def test_free_cores_are_allowed_idle_and_within_the_quota(
    busy: list[float], allowed: set[int], quota: str | None, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: busy)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed)
    monkeypatch.setattr(pace, "WHERE_CGROUPS_ARE", tmp_path)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert free_cores() == free


@pytest.mark.parametrize(("quota", "cores"), [("200000", 2.0), ("-1", float("inf"))])
def test_cpu_quota_of_control_groups_version_one(quota: str, cores: float, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert cpu_quota(tmp_path) == cores


def test_threads_are_only_ever_lowered_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads_for(1) as threads:
            assert threads == torch.get_num_threads() == 1
        with threads_for(64) as threads:
            assert threads == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(usual)


def fit(
    arguments: DemoArguments, seconds: float, monkeypatch: pytest.MonkeyPatch, small: float | None = None
) -> tuple[DemoArguments, str]:
    """With steps that take as long as said; small batches may take less."""
    answers = {arguments.batch_size: seconds, pace.SMALL_BATCH: seconds if small is None else small}
    monkeypatch.setattr(pace, "seconds_per_pass", lambda sizes, *others: answers[sizes.batch_size])
    return fit_to_machine(arguments, None, None)


@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.2])
def test_default_study_on_an_idle_machine_is_not_scaled(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(DemoArguments(), seconds, monkeypatch) == (DemoArguments(), "")


@pytest.mark.parametrize(("seconds", "small"), [(0.5, 0.3), (1.5, 0.8), (3.0, 1.5)])
def test_default_study_on_a_busy_machine_takes_ten_minutes_and_says_so(
    seconds: float, small: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    sizes, note = fit(DemoArguments(), seconds, monkeypatch, small)
    assert 8 * 60 < passes(sizes) * small <= 10.5 * 60
    assert (sizes.batch_size, sizes.test_puzzles) == (32, 64)
    ratio = DemoArguments.warmup_steps / DemoArguments.steps
    assert sizes.warmup_steps / sizes.steps == pytest.approx(ratio, rel=0.2)
    assert note.startswith("Scaled to about 10 min: --batch-size 32 in place of 64")
    assert "differ from the README's" in note
    assert note in capsys.readouterr().out


def test_chosen_sizes_are_never_scaled_unless_minutes_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = DemoArguments(seeds=3, full=True)
    assert fit(chosen, 6.0, monkeypatch) == (chosen, "")
    sizes, note = fit(DemoArguments(seeds=3, full=True, minutes=30), 1.0, monkeypatch, 0.3)
    assert passes(sizes) * 0.3 <= 30 * 60
    assert sizes.seeds == 3
    assert "Scaled to about 30 min" in note


def test_scaling_never_makes_a_study_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = DemoArguments(batch_size=8, steps=4, warmup_steps=4, test_puzzles=5, minutes=0.01)
    assert fit(tiny, 60.0, monkeypatch, 60.0)[0] == tiny


def test_minutes_of_nothing_raise() -> None:
    with pytest.raises(ValueError, match=r"`--minutes=0` must be above 0"):
        DemoArguments(minutes=0)
