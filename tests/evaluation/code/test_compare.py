"""Comparisons: numbers computed by hand, and what the command line says."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from relay_hf.cli import main
from relay_hf.evaluation.code.compare import compare_runs, pair_samples, sign_test
from relay_hf.evaluation.code.report import summarize, write_report
from relay_hf.evaluation.code.samples import Sample, append_samples

SAMPLE = Sample("HumanEval/0", "pass", "pass", True, "passed", 10, 2, 1, 40)


def run(passed: str, denoise: list[int]) -> list[Sample]:
    """Samples from a text of 1 and 0, and forwards."""
    return [
        replace(SAMPLE, task_id=f"HumanEval/{i}", passed=bool(int(digit)), denoise_forwards=count)
        for i, (digit, count) in enumerate(zip(passed, denoise, strict=True))
    ]


# Ten problems: only A solves the first, only B the next six, both the next two, none the last.
RUN_A = run("1000000110", [10] * 10)
RUN_B = run("0111111110", [6] * 8 + [10, 12])


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """The two runs as `relay-hf eval` leaves them; B has one more threshold."""
    for name, samples, thresholds in (("a", RUN_A, [0.85]), ("b", RUN_B, [0.7, 0.85])):
        folder = tmp_path / name
        folder.mkdir()
        for threshold in thresholds:
            append_samples(folder / f"samples_threshold_{threshold}.jsonl", samples)
        settings = {"model": name, "benchmark": "humaneval", "batch_size": len(thresholds)}
        (folder / "settings.json").write_text(json.dumps(settings))
        write_report([summarize(samples, name, threshold) for threshold in thresholds], settings, folder)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 0.0625),  # 2 * 1/32
        (0, 6, 0.03125),  # 2 * 1/64
        (1, 6, 0.125),  # 2 * (1 + 7)/128
        (8, 2, 0.109375),  # 2 * (1 + 10 + 45)/1024
        (3, 3, 1.0),  # 2 * 42/64, but no more than 1
    ],
)
def test_sign_test_equals_values_computed_by_hand(first: int, second: int, p: float) -> None:
    assert sign_test(first, second) == p


def test_pairs_count_problems_that_differ() -> None:
    pairs = pair_samples(RUN_A, RUN_B)
    assert asdict(pairs["passed"]) == {"problems": 10, "mean_a": 0.3, "mean_b": 0.8, "a_higher": 1, "b_higher": 6}
    assert pairs["passed"].p_value == 0.125
    forwards = pairs["denoise_forwards"]
    assert (forwards.mean_a, forwards.mean_b, forwards.a_higher, forwards.b_higher) == (10, 7, 8, 1)
    assert forwards.p_value == 2 * (1 + 9) / 2**9
    assert pairs["commit_forwards"].p_value == 1


def test_command_line_says_what_chance_explains(folders: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", *folders, "--picture", folders[0] + "/both.png"]) == 0
    assert capsys.readouterr().out == (
        "Note: beside the model, the evaluations differ in batch_size.\n\n"
        "samples_threshold_0.85\n"
        "per problem              A         B   B against A   sign test\n"
        "denoise_forwards      10.0       7.0        -30.0%   p = 0.039\n"
        "commit_forwards        2.0       2.0         +0.0%   p = 1\n"
        "prefill_forwards       1.0       1.0         +0.0%   p = 1\n"
        "pass@1: A 30.0%, B 80.0%: +50.0 points, where one problem of 10 is 10.00.\n"
        "6 problems only B solves, 1 only A. Exact McNemar test: p = 0.12, chance alone may explain it (significant "
        "below 0.05).\n"
    )
    assert Path(folders[0], "both.png").read_bytes().startswith(b"\x89PNG")


def test_files_at_different_thresholds_are_compared(folders: list[str]) -> None:
    text = compare_runs(f"{folders[0]}/samples_threshold_0.85.jsonl", f"{folders[1]}/samples_threshold_0.7.jsonl")
    assert "samples_threshold_0.85 / samples_threshold_0.7\n" in text
    assert "80.0%" in text


def test_clear_difference_is_called_significant(tmp_path: Path) -> None:
    for name, passed in (("a", "000000"), ("b", "111111")):
        append_samples(tmp_path / f"{name}.jsonl", run(passed, [1] * 6))
    text = compare_runs(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert "p = 0.031, more than chance explains" in text


def test_what_cannot_be_compared_is_one_sentence(folders: list[str], tmp_path: Path) -> None:
    file = Path(folders[0], "samples_threshold_0.85.jsonl")
    append_samples(tmp_path / "short.jsonl", RUN_A[:3])
    with pytest.raises(ValueError, match=r"different problems \(10 and 3\): evaluate both to the end"):
        compare_runs(str(file), str(tmp_path / "short.jsonl"))
    with pytest.raises(ValueError, match="has a line that is no answer"):
        compare_runs(str(file), f"{folders[0]}/results.json")
    with pytest.raises(OSError, match="`nowhere` does not exist"):
        compare_runs("nowhere", folders[0])
    with pytest.raises(ValueError, match="give two output folders"):
        compare_runs(str(file), folders[1], str(tmp_path / "both.png"))
    with pytest.raises(ValueError, match="give two output folders, or two files"):
        compare_runs(folders[0], str(file))
    file.unlink()
    with pytest.raises(ValueError, match="share no threshold"):
        compare_runs(*folders)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(bytes(range(128, 256))),
    "list": lambda path: path.write_text("[1, 2]\n"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["settings.json", "results.json", "samples_threshold_0.85.jsonl"])
def test_comparison_with_a_damaged_file_is_one_sentence(
    folders: list[str], capsys: pytest.CaptureFixture, tmp_path: Path, name: str, damage: str
) -> None:
    DAMAGES[damage](Path(folders[1]) / name)
    assert main(["compare", *folders, "--picture", str(tmp_path / "curves.png")]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("relay-hf: error: ")
    assert name in said


def test_comparison_with_results_of_other_settings_is_refused(folders: list[str], tmp_path: Path) -> None:
    (Path(folders[1]) / "results.json").write_text('{"settings": [1], "results": []}')
    with pytest.raises(ValueError, match=r"results\.json` is not a result of `relay-hf eval`"):
        compare_runs(*folders, picture=str(tmp_path / "curves.png"))
