"""The runner of studies, `benchmarks/study.py`, on models of one layer: seconds."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = {"hidden_size": 32, "layers": 1, "batch_size": 4, "warmup_steps": 3, "steps": 2, "test_puzzles": 6, "size": 4}
ARMS = ["rollout", "relay, W = 2"]
THRESHOLDS = (0.9, 0.3)


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import study
    from text_workload import Balances

    monkeypatch.setattr(Balances, "thresholds", THRESHOLDS)
    return study


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of text with two seeds, at equal steps and at equal compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import study
        from text_workload import Balances

        patch.setattr(Balances, "thresholds", THRESHOLDS)
        folder = tmp_path_factory.mktemp("study")
        study.run_study("text", SMALL, folder, ARMS, seeds=[0, 1], equal_compute="relay, W = 2")
    return folder


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def random_model(workload: Any, channel: str) -> Any:
    """A model whose predictions differ, with an open channel."""
    torch.manual_seed(0)
    model = workload.new_model({"relay_channel": channel})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def digits(line: dict[str, Any]) -> dict[str, Any]:
    """A line without its times, at two thresholds."""
    curves = {
        view: [{**point, "seconds": None} for point in curve if point["threshold"] in THRESHOLDS]
        for view, curve in line["curves"].items()
    }
    return {**line, "seconds": None, "curves": curves}


def test_study_keeps_a_line_per_arm_seed_and_budget(finished: Path) -> None:
    lines = lines_of(finished)
    found = {(line["arm"], line["seed"], line["budget"]) for line in lines}
    started = {("start", seed, "steps") for seed in (0, 1)}
    assert found == started | {(arm, seed, b) for arm in ARMS for seed in (0, 1) for b in ("steps", "compute")}
    assert len(found) == len(lines)
    for line in lines:
        assert [point["threshold"] for point in line["curves"][""]] == [*THRESHOLDS]
        assert line["operations"] > 0
        assert all(point["operations"] > 0 and point["forwards"] >= 1 for point in line["curves"][""])


def test_study_tables_and_pictures_are_written(finished: Path) -> None:
    text = (finished / "tables.md").read_text()
    assert text.index("## Equal steps") < text.index("## Equal compute")
    assert "| exact match, %, minus `rollout` | seeds |" in text
    names = {path.name for path in finished.glob("*.png")}
    assert {"equal_steps_forwards.png", "equal_steps_seconds.png", "equal_compute_operations.png"} <= names


def test_study_interrupted_in_a_line_goes_on_with_the_same_digits(study: Any, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "interrupted"
    shutil.copytree(finished, folder)
    lines = lines_of(folder)
    dropped = next(line for line in lines if (line["arm"], line["budget"]) == ("relay, W = 2", "steps"))
    texts = [json.dumps(line) for line in lines if line != dropped]
    (folder / "results.jsonl").write_text("\n".join([*texts, json.dumps(dropped)[:40]]))
    study.run_study("text", SMALL, folder, ARMS, seeds=[0, 1], equal_compute="relay, W = 2")
    *before, half, again = (folder / "results.jsonl").read_text().splitlines()
    assert before == texts
    assert half == json.dumps(dropped)[:40]
    assert digits(json.loads(again)) == digits(dropped)
    assert json.loads(again)["seconds"] != dropped["seconds"]


def test_study_in_another_process_has_the_same_digits(study: Any, finished: Path, tmp_path: Path) -> None:
    study.run_study("text", SMALL, tmp_path, ["rollout"], seeds=[1], processes=2)
    wanted = {
        line["arm"]: digits(line) for line in lines_of(finished) if (line["seed"], line["budget"]) == (1, "steps")
    }
    assert {line["arm"]: digits(line) for line in lines_of(tmp_path)} == {
        arm: wanted[arm] for arm in ("start", "rollout")
    }


def test_study_of_traces_trains_on_right_answers_of_the_arm_before(study: Any, tmp_path: Path) -> None:
    from study_runner import Runner
    from text_workload import Balances

    folder = tmp_path / "traces"
    sizes = SMALL | {"size": 2, "warmup_steps": 60, "steps": 2, "batch_size": 16}
    arms = ["relay, W = 2", "own traces, stride 2"]
    study.run_study("text", sizes, folder, arms, seeds=[0])
    assert [line["arm"] for line in lines_of(folder)] == ["start", *arms]
    runner = Runner(Balances(**sizes), study.TEXT, folder)
    asked = runner.workload.asked(40, seed=7)
    rows = runner._traces(runner.model_of("relay, W = 2", 0), asked)
    right = {row["prompt"] + row["answer"] for row in asked}
    assert 0 < len(rows) < len(asked)
    assert {runner.workload.tokenizer.decode(ids) for ids in rows["input_ids"]} <= right


def test_states_are_changed_and_given_back(study: Any, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from study_runner import Runner
    from text_workload import Balances

    workload = Balances(size=16)
    prompts = torch.tensor(workload.tokens(workload.asked(5, seed=0))[0])
    options = {"attention_mask": torch.ones_like(prompts), "unmasking_threshold": 0.02}

    def write(model: Any, *unread: Any) -> dict[str, Any]:
        return {"text": model.generate(prompts, **options).tolist()}

    runner, model = Runner(workload, study.TEXT, finished), random_model(workload, "layer_norm")
    monkeypatch.setattr(workload, "evaluate", write)
    plain, zeros, another, again = (
        runner.curve(model, 0, state)[0]["text"] for state in (None, "zeros", "another row", None)
    )
    assert plain == again
    assert plain != zeros
    assert plain != another


def test_steps_that_are_followed_write_the_text_of_generate(study: Any, finished: Path) -> None:
    import states
    from text_workload import Balances

    workload = Balances(size=16)
    model, other = random_model(workload, "layer_norm"), random_model(workload, "none")
    prompts = torch.tensor(workload.tokens(workload.asked(5, seed=0))[0])
    steps = list(states.follow(model, other, prompts))
    written = model.generate(prompts, attention_mask=torch.ones_like(prompts), unmasking_threshold=states.THRESHOLD)
    assert torch.equal(steps[-1][1]["final"], written[:, 16:])
    shares = states.agreement(steps)
    assert shares["relay"][-1] > shares["rollout"][-1]


def test_shares_by_distance_count_from_the_last_revealed_digit(study: Any) -> None:
    import states

    masked = torch.tensor([[True, False, True, True] + [False] * 11 + [True]])
    answers = torch.arange(16)[None]
    wrong_at_2 = answers.where(answers != 2, 0)
    none = (torch.zeros_like(masked), {"final": answers})
    shares = states.agreement_by_distance(
        [(masked, {"relay": answers - 1}), (masked, {"relay": wrong_at_2}), none], answers
    )
    # One away are positions 0, 2 and 15; two away is 3; nothing is farther.
    assert shares["relay"][:2] == [pytest.approx(200 / 3), 100]
    assert np.isnan(shares["relay"][2:]).all()


def test_states_writes_tables_and_a_picture(study: Any, tmp_path: Path) -> None:
    import states

    sizes = SMALL | {"size": 16, "test_puzzles": 3}
    study.run_study("text", sizes, tmp_path, ARMS, seeds=[0, 1])
    text = states.run(tmp_path, "relay, W = 2", "rollout", **sizes)
    assert "| relay, state of zeros | 2 |" in text
    assert "| predicted as in the answer, %, from step 2 on | seeds | 1 away | 2 away | 3 to 4 |" in text
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("states.png", "reply.png"))


def test_reply_that_is_drawn_is_the_first_with_mistakes_to_mend(study: Any) -> None:
    import states

    answers, masked = torch.zeros(3, 16, dtype=torch.long), torch.ones(3, 16, dtype=torch.bool)
    predicted = answers.clone()
    predicted[0, : states.MISTAKES - 1] = 1
    predicted[1:, : states.MISTAKES] = 1
    assert states.hard_row([(masked, {"relay": predicted})], answers) == 1


def test_study_of_boards_runs(study: Any, tmp_path: Path) -> None:
    sizes = SMALL | {"puzzles": 20, "size": 4}
    study.run_study("windows", sizes, tmp_path, ["relay_sg"], seeds=[0])
    assert [line["arm"] for line in lines_of(tmp_path)] == ["start", "relay_sg"]


def test_study_unknown_arm_raises(study: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="relays"):
        study.run_study("text", SMALL, tmp_path, ["relays"])


def test_study_other_sizes_in_the_folder_raise(study: Any, finished: Path) -> None:
    with pytest.raises(ValueError, match="choose another folder"):
        study.run_study("text", SMALL | {"steps": 3}, finished)


def test_readings_interpolate_and_do_not_extrapolate(study: Any) -> None:
    from study_results import cost_at, score_at, score_within

    curve = [{"forwards": 4.0, "exact": 0.8}, {"forwards": 2.0, "exact": 0.4}, {"forwards": 3.0, "exact": 0.5}]
    assert score_at(curve, 3.5) == pytest.approx(65)
    assert cost_at(curve, 45) == pytest.approx(2.5)
    flat = [{"forwards": 2.0, "exact": 0.4}, {"forwards": 3.0, "exact": 0.5}, {"forwards": 9.0, "exact": 0.5}]
    assert [cost_at(flat, 40), cost_at(flat, 50)] == [2, 3]
    assert score_within(curve, 3.5) == pytest.approx(65)
    assert [score_within(curve, 4.1), score_within(curve, 99)] == [pytest.approx(80)] * 2
    assert np.isnan(
        [score_within(curve, 1.9), score_at(curve, 1.9), score_at(curve, 4.1), cost_at(curve, 39), cost_at(curve, 81)]
    ).all()


def test_scores_within_the_forwards_of_an_arm_are_paired_by_seed(study: Any) -> None:
    from study_results import scores_within

    def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
        return [{"threshold": 1 / cost, "forwards": cost, "exact": exact} for cost, exact in points]

    plain = {seed: curve((4.0, 0.5), (2.0, 0.25)) for seed in range(3)}
    better = {seed: curve((3.0, 0.75 + seed / 100), (1.0, 0.25)) for seed in range(3)}
    *_, line = scores_within({"plain": plain, "better": better}, "plain").splitlines()
    # Within 4 forwards what it has with 3; within 2 the mean of 25 and 75 to 77.
    assert line == "| better | 3 | +26.0 ± 2.5 | +25.5 ± 1.2 |"


def test_table_pairs_gains_by_seed(study: Any) -> None:
    from study_results import table

    rows = {"a": {0: [10.0], 1: [20.0], 2: [30.0]}, "b": {2: [33.0], 0: [11.0], 1: [22.0]}, "c": {0: [float("nan")]}}
    assert table("score", ["at 3"], rows).splitlines()[3:] == ["| b | 3 | 22.0 ± 11.0 |", "| c | 1 | – |"]
    # Mean 2, standard deviation 1, t of two degrees of freedom 4.303; one seed or two show none.
    assert table("score", ["at 3"], rows, "a").splitlines()[2:] == ["| b | 3 | +2.0 ± 2.5 |"]
