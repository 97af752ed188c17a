"""The demo from end to end in its smallest form: trained, compared, saved, loaded by a new process, solved."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from relay_hf.cli import main
from relay_hf.demo.report import compare_at_equal_forwards
from relay_hf.hub_cards import EvaluationRow

SMALL = {
    "size": 4, "steps": 2, "warmup-steps": 2, "puzzles": 20, "test-puzzles": 4, "batch-size": 4, "hidden-size": 32,
    "layers": 1, "seeds": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Runs once; its folder and what the terminal showed, the new process included."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "out" / "trainer").mkdir(parents=True)  # not ours
    options = [text for name, value in SMALL.items() for text in (f"--{name}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        # One that also sees what child processes print.
        import os
        import sys

        log = folder / "terminal.txt"
        with log.open("w") as stream:
            saved = os.dup(1)
            os.dup2(stream.fileno(), 1)
            patch.setattr(sys, "stdout", os.fdopen(os.dup(stream.fileno()), "w"))
            try:
                assert main(["demo", "--full", "--output-dir", str(folder / "out"), *options]) == 0
            finally:
                sys.stdout.flush()
                os.dup2(saved, 1)
                os.close(saved)
    return folder / "out", log.read_text()


def test_demo_prints_a_row_for_every_objective_and_threshold(demo: tuple[Path, str]) -> None:
    rows = re.findall(r"^(masked|rollout|relay_sg|relay) +([\d.]+) ", demo[1], flags=re.MULTILINE)
    assert len(rows) == len(set(rows)) == 20
    assert "relay against rollout at equal forwards:" in demo[1]


def test_demo_new_process_fills_the_whole_board(demo: tuple[Path, str]) -> None:
    assert re.search(r"(solved|filled in wrongly) in \d+ denoise forwards", demo[1])
    assert ", 0 to go" in demo[1]


def test_demo_writes_no_colours_into_a_file(demo: tuple[Path, str]) -> None:
    assert "\033[" not in demo[1].split("0 to go")[0][demo[1].index("puzzle\n") :]


def test_demo_results_hold_every_run_and_agree_with_the_card(demo: tuple[Path, str]) -> None:
    results = json.loads((demo[0] / "results.json").read_text())
    assert [(run["objective"], run["seed"]) for run in results["runs"]][-1] == ("relay", 1)
    assert len(results["runs"]) == 8
    relay = [run["evaluations"][1] for run in results["runs"] if run["objective"] == "relay"]
    forwards = sum(evaluation["denoise_forwards"] for evaluation in relay) / 2
    card = ModelCard.load(demo[0] / "relay-sudoku-4x4" / "README.md")
    assert card.data.license is None  # weights that somebody trained: theirs to license
    exact = [r for r in card.data.eval_results if r.metric_type == "exact_match"]
    assert exact[1].metric_args["denoise_forwards"] == pytest.approx(forwards, abs=1e-4)
    assert card.content.count("| relay_sg |") == 5


def test_demo_model_folder_is_complete(demo: tuple[Path, str]) -> None:
    names = {path.name for path in (demo[0] / "relay-sudoku-4x4").iterdir()}
    expected = {
        "README.md",
        "accuracy_against_forwards.png",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert expected | {"tokenizer.json"} <= names


def test_demo_touches_no_other_folder(demo: tuple[Path, str]) -> None:
    assert {path.name for path in demo[0].iterdir()} == {"relay-sudoku-4x4", "results.json", "trainer"}


def row(label: str, forwards: float, accuracy: float) -> EvaluationRow:
    return EvaluationRow(label, {"exact_match": accuracy}, forwards, 0.0, 0.0, samples=10)


def test_compare_at_equal_forwards_interpolates_and_leaves_out_what_it_cannot() -> None:
    rows = {
        "rollout": [row("rollout", 4.0, 0.2), row("rollout", 8.0, 0.6)],
        "relay": [row("relay", 3.0, 0.9), row("relay", 5.0, 0.5), row("relay", 6.0, 0.35)],
    }
    sentence = compare_at_equal_forwards(rows, "rollout")
    assert sentence == "relay against rollout at equal forwards: +20.0 points at 5.0, -5.0 points at 6.0."


def test_compare_at_equal_forwards_without_overlap_says_so() -> None:
    rows = {"masked": [row("masked", 4.0, 0.2)], "relay": [row("relay", 3.0, 0.9)]}
    assert "never spend the same" in compare_at_equal_forwards(rows, "masked")
