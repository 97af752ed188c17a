"""Facts are checked when they are given, so that a wrong number never reaches a card."""

import pytest

from relay_hf.hub_cards import DatasetFacts, Evaluation, EvaluationRow, RelayCardData, TrainingFacts


@pytest.mark.parametrize("value", [79.7, -0.1, float("nan")])
def test_row_metric_outside_fraction_raises(value, make_row):
    with pytest.raises(ValueError, match=r"exact_match.*`relay`.*not a fraction"):
        make_row("relay", 0.1, value, 5.0)


def test_row_without_metrics_raises():
    with pytest.raises(ValueError, match="no metrics"):
        EvaluationRow("relay", {}, 1.0, 0.0, 0.0, 10)


def test_row_spread_of_unknown_metric_raises(make_row):
    with pytest.raises(ValueError, match="spread of \\['accuracy'\\]"):
        make_row("relay", 0.1, 0.5, 5.0, spread={"accuracy": 0.1})


@pytest.mark.parametrize("field", ["denoise_forwards", "commit_forwards", "prefill_forwards", "samples", "seeds"])
def test_row_negative_count_raises(field):
    facts = {"denoise_forwards": 1.0, "commit_forwards": 1.0, "prefill_forwards": 1.0, "samples": 1, field: -1}
    with pytest.raises(ValueError, match=f"{field}=-1"):
        EvaluationRow("relay", {"exact_match": 0.5}, **facts)


def test_evaluation_highlighting_foreign_row_raises(evaluation, make_row):
    with pytest.raises(ValueError, match="not among the rows"):
        Evaluation(evaluation.dataset, evaluation.rows, make_row("relay", 0.9, 0.1, 3.0))


def test_evaluation_rows_with_different_metrics_raise(evaluation, make_row):
    other = make_row("masked", 0.1, 0.5, 5.0, metrics={"exact_match": 0.5})
    with pytest.raises(ValueError, match="different metrics"):
        Evaluation(evaluation.dataset, [*evaluation.rows, other], evaluation.highlighted)


@pytest.mark.parametrize("picture", ["", "images/a.png", "..\\a.png"])
def test_evaluation_picture_with_folder_raises(evaluation, picture):
    with pytest.raises(ValueError, match="beside the card"):
        Evaluation(evaluation.dataset, evaluation.rows, evaluation.highlighted, picture=picture)


def test_evaluation_own_rows_are_those_of_the_highlighted_label(evaluation):
    assert [row.threshold for row in evaluation.own_rows] == [0.05, 0.25]


@pytest.mark.parametrize("name", ["steps", "seconds", "parameters"])
def test_training_negative_amount_raises(name):
    with pytest.raises(ValueError, match=f"{name}=-1"):
        TrainingFacts(**{name: -1})


@pytest.mark.parametrize("name", ["", "  ", "two\nlines"])
def test_card_name_not_one_line_raises(name):
    with pytest.raises(ValueError, match="name of one line"):
        RelayCardData(name)


def test_facts_are_frozen():
    with pytest.raises(AttributeError):
        DatasetFacts("a").name = "b"
