"""One complete card, small enough to read."""

from collections.abc import Callable

import pytest

from relay_hf.hub_cards import DatasetFacts, Evaluation, EvaluationRow, RelayCardData, TrainingFacts

DATASET = DatasetFacts("Sudoku 6x6", "500 puzzles that were held out", hub_id="org/sudoku", config="6x6", split="test")


def row_of(label: str, threshold: float, exact: float, denoise: float, **changes: object) -> EvaluationRow:
    """A row whose three kinds of forwards differ, so that none can be mistaken for another."""
    facts = {
        "metrics": {"exact_match": exact, "cell_accuracy": 0.9612},
        "commit_forwards": denoise + 10,
        "prefill_forwards": denoise + 20,
        "samples": 500,
        "threshold": threshold,
    }
    return EvaluationRow(label, denoise_forwards=denoise, **{**facts, **changes})


@pytest.fixture
def make_row() -> Callable[..., EvaluationRow]:
    """`make_row(label, threshold, exact_match, denoise_forwards, **changes)`."""
    return row_of


@pytest.fixture
def evaluation() -> Evaluation:
    """Two settings of this model (`relay`) and one of another (`rollout`)."""
    rows = [
        row_of("rollout", 0.15, 0.868, 7.13),
        row_of("relay", 0.05, 0.938, 7.94),
        row_of("relay", 0.25, 0.608, 5.07),
    ]
    return Evaluation(
        DATASET, rows, rows[2], unit="puzzle", picture="accuracy.png", comment="Relay needs fewer forwards."
    )


@pytest.fixture
def data(evaluation: Evaluation) -> RelayCardData:
    """A card with every field filled in."""
    training = TrainingFacts(
        datasets=[DATASET],
        recipe="1,000 steps from scratch, then 400.",
        arguments={"learning_rate": 5e-6, "max_grad_norm": None, "packing": False, "tags": "a|b"},
        steps=1400,
        seconds=3725.0,
        parameters=345678,
        hardware="2 CPU cores",
        versions={"torch": "2.13.0", "relay_hf": "0.1.0"},
    )
    return RelayCardData(
        name="sudoku-relay",
        base_model="org/base-model",
        channel="the last hidden state through a LayerNorm",
        objective="relay",
        objective_description="back-propagation through two steps",
        training=training,
        evaluations=[evaluation],
        usage="print('<a & b> {{ c }}')",
        limits=["It knows 6x6 puzzles only.", "It was trained for minutes."],
        license="apache-2.0",
        language=["en"],
        tags=["sudoku", "relay"],
        pipeline_tag="text-generation",
    )
