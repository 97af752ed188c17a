"""From lm-evaluation-harness to the card, through the command lines; and what may not become a card."""

import copy
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from lm_eval.tasks import TaskManager

from relay_hf import RelayForMaskedDiffusion
from relay_hf.cli import main
from relay_hf.evaluation.__main__ import cli_evaluate
from relay_hf.evaluation.weights import hash_weights


def test_results_of_the_harness_become_a_card(
    checkpoint: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The harness would read its 13 000 tasks.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    for name, options in (("high", ""), ("off", ",use_relay=False")):
        command = ["relay_hf.evaluation", "--model", "relay", "--tasks", "write,choose"]
        command += ["--include_path", str(tasks), "--model_args", f"pretrained={checkpoint}{options}"]
        command += ["--device", "cpu", "--gen_kwargs", "unmasking_threshold=0.9", "--output_path", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", command)
        cli_evaluate()
    (high,), (off,) = ([*(tmp_path / name).rglob("results_*.json")] for name in ("high", "off"))
    assert main(["card", str(checkpoint), str(high), str(off)]) == 0
    card = ModelCard.load(checkpoint / "README.md")
    content = json.loads(high.read_text())
    costs = content["config"]["generation_forwards"]["write"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_name) == ("exact_match", "write")
    assert result.metric_value == content["results"]["write"]["exact_match,none"]
    assert result.metric_args == {
        "unmasking_threshold": 0.9,
        **{kind: pytest.approx(costs[kind]) for kind in ("denoise_forwards", "commit_forwards", "prefill_forwards")},
        "samples": 3,
        "seeds": 1,
    }
    cells = ["model", "0.9", f"{100 * result.metric_value:.1f}", f"{costs['denoise_forwards']:.2f}"]
    assert "| " + " | ".join(f"**{cell}**" for cell in cells) + " |" in card.text
    assert f"| model ({off.stem}) | 0.9 |" in card.text
    assert "task `write`, 0 examples in the prompt" in card.text
    assert "`use_relay=True`" in card.text
    assert "### choose" not in card.text, "forwards are only counted where the model writes"


def results_of(model: RelayForMaskedDiffusion, **changes: Any) -> dict[str, Any]:
    """What the card reads of a file of the harness."""
    task = {"dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test", "generation_kwargs": {}}
    forwards = {"requests": 4, "denoise_forwards": 5.5, "commit_forwards": 2.0, "prefill_forwards": 1.0}
    return {
        "config": {
            "weights": hash_weights(model),
            "model_dtype": "torch.float32",
            "generation_options": {"unmasking_threshold": 0.3, "use_relay": True},
            "generation_forwards": {"gsm8k": forwards},
        },
        "results": {
            "gsm8k": {
                "alias": "gsm8k",
                "exact_match,strict-match": 0.25,
                "exact_match_stderr,strict-match": 0.125,
                "exact_match,flexible-extract": 0.5,
                "sample_len": 4,
            }
        },
        "configs": {"gsm8k": task},
        "n-samples": {"gsm8k": {"original": 4, "effective": 4}},
        "n-shot": {"gsm8k": 5},
        "versions": {"gsm8k": 3.0},
        "task_hashes": {"gsm8k": "abc"},
        "lm_eval_version": "0.4.13",
        "model_name": "some/model",
        **changes,
    }


@pytest.fixture
def write(checkpoint: Path, tmp_path: Path) -> Any:
    """Writes a file of results and returns its path; functions change the content before."""
    content = results_of(RelayForMaskedDiffusion.from_pretrained(checkpoint))

    def write(name: str, change: Any = lambda content: None) -> str:
        changed = copy.deepcopy(content)
        change(changed)
        (tmp_path / name).write_text(json.dumps(changed))
        return str(tmp_path / name)

    return write


def test_thresholds_of_one_model_stand_below_each_other(write: Any, checkpoint: Path) -> None:
    def at_another_threshold(content: dict[str, Any]) -> None:
        content["configs"]["gsm8k"]["generation_kwargs"]["unmasking_threshold"] = 0.7

    def of_another_model(content: dict[str, Any]) -> None:
        content["config"]["weights"] = "others"

    files = [write("a.json"), write("b.json", at_another_threshold), write("c.json", of_another_model)]
    assert main(["card", str(checkpoint), *files]) == 0
    card = ModelCard.load(checkpoint / "README.md")
    assert [(r.metric_type, r.metric_args["unmasking_threshold"]) for r in card.data.eval_results] == [
        ("exact_match (strict-match)", 0.3),
        ("exact_match (flexible-extract)", 0.3),
        ("exact_match (strict-match)", 0.7),
        ("exact_match (flexible-extract)", 0.7),
    ]
    assert {(r.dataset_type, r.dataset_config) for r in card.data.eval_results} == {("openai/gsm8k", "main")}
    # The model's own threshold is 0.3.
    assert "| **model** | **0.3** | **25.0** | **50.0** |" in card.text
    assert "| model | 0.7 | 25.0 | 50.0 |" in card.text
    assert "| model (c) | 0.3 |" in card.text
    assert "task `gsm8k` version 3, 5 examples in the prompt" in card.text
    assert "in points: exact_match 12.5." in card.text


def test_part_of_a_task_is_not_called_the_task(write: Any, checkpoint: Path) -> None:
    file = write("a.json", lambda content: content["n-samples"]["gsm8k"].update(effective=2))
    assert main(["card", str(checkpoint), file]) == 0
    result = ModelCard.load(checkpoint / "README.md").data.eval_results[0]
    assert (result.dataset_name, result.dataset_type) == ("gsm8k, 2 of 4 problems", "gsm8k-2-of-4-problems")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["config"].update(weights="others"), "evaluated other weights than those in"),
        (lambda content: content["config"].update(generation_forwards={}), "no task in which the model wrote text"),
        (lambda content: content.pop("configs"), "holds no results of `python -m relay_hf.evaluation`"),
        (lambda content: content["config"].pop("weights"), "holds no results of `python -m relay_hf.evaluation`"),
        (lambda content: content.update(config={}, results={}), "of another version (it lacks ['generation_forwards'"),
    ],
)
def test_other_results_are_refused(
    write: Any, checkpoint: Path, change: Any, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["card", str(checkpoint), write("a.json", change)]) == 2
    assert message in capsys.readouterr().err
    assert not (checkpoint / "README.md").exists()


def test_other_questions_and_mixed_evaluations_are_refused(
    write: Any, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    other = write("b.json", lambda content: content["task_hashes"].update(gsm8k="other"))
    assert main(["card", str(checkpoint), write("a.json"), other]) == 2
    assert "hold different questions of `gsm8k`" in capsys.readouterr().err
    assert main(["card", str(checkpoint), write("a.json"), str(checkpoint)]) == 2
    assert "give folders of `relay-hf eval`, or files of the harness" in capsys.readouterr().err
