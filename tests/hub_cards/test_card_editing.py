"""Results and code that are added to a card which is there already."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from relay_hf.hub_cards import (
    NOT_EVALUATED,
    DatasetFacts,
    Evaluation,
    RelayCardData,
    add_evaluation,
    generate_snippet,
    has_card,
    read_card,
    render_card,
    save_card,
    set_usage,
)


@pytest.fixture
def folder(data: RelayCardData, tmp_path: Path) -> Path:
    """A card without evaluation, to which somebody has added a section."""
    save_card(replace(data, evaluations=[], limits=["It is small.", NOT_EVALUATED]), tmp_path)
    with (tmp_path / "README.md").open("a") as file:
        file.write("\n## Thanks\n\nTo you.\n")
    (tmp_path / "accuracy.png").touch()
    return tmp_path


def test_added_evaluation_reads_as_if_it_had_been_there_from_the_start(
    data: RelayCardData, evaluation: Evaluation, tmp_path: Path
) -> None:
    (tmp_path / "accuracy.png").touch()
    save_card(replace(data, evaluations=[], limits=[*data.limits, NOT_EVALUATED]), tmp_path)
    path = add_evaluation(tmp_path, evaluation)
    assert path.read_text(encoding="utf-8") == render_card(data)


def test_evaluations_on_several_data_sets_stand_side_by_side(folder: Path, evaluation: Evaluation) -> None:
    other = replace(evaluation, dataset=DatasetFacts("Other"), picture=None, comment="Also.")
    add_evaluation(folder, evaluation)
    add_evaluation(folder, other)
    card = read_card(folder)
    assert [line for line in card.text.splitlines() if line.startswith("#")] == [
        "# sudoku-relay",
        "## How to use",
        "## Evaluation",
        "### Sudoku 6x6",
        "### Other",
        "## Training",
        "### Data",
        "### Arguments",
        "### Run",
        "## Limits",
        "## Citation",
        "## Framework versions",
        "## Thanks",
    ]
    assert [result.dataset_name for result in card.data.eval_results] == ["Sudoku 6x6"] * 4 + ["Other"] * 4
    assert "To you." in card.text
    assert NOT_EVALUATED not in card.text


def test_results_on_the_same_data_set_are_replaced(folder: Path, evaluation: Evaluation) -> None:
    add_evaluation(folder, evaluation)
    before = (folder / "README.md").read_text()
    better = replace(evaluation.highlighted, metrics={"exact_match": 0.99, "cell_accuracy": 1.0})
    add_evaluation(folder, replace(evaluation, rows=[better], highlighted=better))
    card = read_card(folder)
    assert card.text.count("### Sudoku 6x6") == 1
    assert sorted(result.metric_value for result in card.data.eval_results) == [0.99, 1.0]
    add_evaluation(folder, evaluation)
    assert (folder / "README.md").read_text() == before


def test_limit_that_is_the_only_one_goes_with_its_heading(
    data: RelayCardData, evaluation: Evaluation, tmp_path: Path
) -> None:
    save_card(replace(data, evaluations=[], limits=[NOT_EVALUATED]), tmp_path)
    add_evaluation(tmp_path, replace(evaluation, picture=None))
    assert "## Limits" not in (tmp_path / "README.md").read_text()


def test_card_that_somebody_wrote_by_hand_keeps_its_metadata(evaluation: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\nmine: [1, 2]\n---\n# Mine\n\nText.\n")
    add_evaluation(tmp_path, replace(evaluation, picture=None))
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.to_dict()["mine"]) == ("mit", [1, 2])
    assert card.data.model_name == tmp_path.name
    assert card.text.startswith("\n# Mine\n\nText.\n\n## Evaluation\n\n### Sudoku 6x6\n")


@pytest.mark.parametrize(
    "card", ["---\r\nlicense: mit\r\n---\r\n# Mine\r\n", "\ufeff---\nlicense: mit\n---\n# Mine\n", "# Mine"]
)
def test_card_of_any_editor_is_understood(evaluation: Evaluation, tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    add_evaluation(tmp_path, replace(evaluation, picture=None))
    written = (tmp_path / "README.md").read_bytes().decode()
    assert "\r" not in written
    assert written.startswith("---\nlicense: mit\nmodel-index:" if "mit" in card else "---\nmodel-index:")
    assert "---\n\n# Mine\n\n## Evaluation\n" in written


@pytest.mark.parametrize(
    ("card", "error", "message"),
    [
        (None, FileNotFoundError, "README.md"),
        ("---\ntags: [a\n---\n", ValueError, r"metadata of `README.md` cannot be read .* correct it"),
    ],
)
def test_card_that_cannot_be_edited_is_refused(
    evaluation: Evaluation, tmp_path: Path, card: str | None, error: type, message: str
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    with pytest.raises(error, match=message):
        add_evaluation(tmp_path, replace(evaluation, picture=None))


def test_evaluation_without_its_picture_changes_nothing(folder: Path, evaluation: Evaluation) -> None:
    before = (folder / "README.md").read_text()
    with pytest.raises(FileNotFoundError, match=r"`gone\.png` is not in .*: write the picture there"):
        add_evaluation(folder, replace(evaluation, picture="gone.png"))
    assert (folder / "README.md").read_text() == before


def test_two_evaluations_under_one_name_are_refused(data: RelayCardData, evaluation: Evaluation) -> None:
    with pytest.raises(ValueError, match="name each data set differently"):
        replace(data, evaluations=[evaluation, evaluation])


def test_form_that_nobody_filled_in_is_no_card(tmp_path: Path) -> None:
    assert not has_card(tmp_path)
    form = ModelCard.from_template(ModelCardData())
    form.save(tmp_path / "README.md")
    assert not has_card(tmp_path)
    (tmp_path / "README.md").write_text(str(form).replace("Model ID", "mine"))
    assert has_card(tmp_path), "what is left of the form does not matter"


# -- code -------------------------------------------------------------------------------------------------------------


def test_usage_of_the_folder_becomes_that_of_the_repository(tmp_path: Path) -> None:
    save_card(RelayCardData("x", usage='load("/home/me/x")  # from "/home/me/xy"'), tmp_path)
    set_usage(tmp_path, "me/x", "not used", earlier_id="/home/me/x")
    assert 'load("me/x")  # from "/home/me/xy"' in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("loaded", "becomes"),
    [("/gone/x", "me/x"), ('/gone/a "b"', "me/x"), ("my-relay", "me/x"), ("you/other", "you/other")],
)
def test_usage_of_a_folder_that_was_moved_becomes_that_of_the_repository(
    tmp_path: Path, loaded: str, becomes: str
) -> None:
    own = 'AutoModel.from_pretrained("/data/base")'
    save_card(RelayCardData("x", usage=f'{generate_snippet(loaded)}\nbase = {own}\nprint("")'), tmp_path)
    set_usage(tmp_path, "me/x", "not used", earlier_id=str(tmp_path))
    expected = RelayCardData("x", usage=f'{generate_snippet(becomes)}\nbase = {own}\nprint("")')
    assert (tmp_path / "README.md").read_text() == render_card(expected)


def test_code_is_said_to_be_in_the_repository_only_beside_the_code(tmp_path: Path) -> None:
    card, code, claim = tmp_path / "README.md", tmp_path / "modeling_relay.py", "the code is in the repository"
    save_card(RelayCardData("x", usage=generate_snippet("my-relay")), tmp_path)
    assert claim not in card.read_text()
    assert "`relay-hf push FOLDER OWNER/NAME` uploads the code as well" in card.read_text()
    set_usage(tmp_path, "me/x", "")
    assert claim not in card.read_text()
    code.touch()
    set_usage(tmp_path, "me/x", "")
    assert claim in card.read_text()
    assert "relay-hf push" not in card.read_text()
    code.unlink()
    set_usage(tmp_path, str(tmp_path), "")
    assert claim not in card.read_text()


def test_usage_is_added_to_our_cards_only(tmp_path: Path) -> None:
    save_card(RelayCardData("x", limits=["Small."]), tmp_path)
    set_usage(tmp_path, "me/x", 'load("me/x")')
    text = (tmp_path / "README.md").read_text()
    assert text == render_card(RelayCardData("x", usage='load("me/x")', limits=["Small."]))
    (tmp_path / "README.md").write_text("# Mine")
    set_usage(tmp_path, "me/x", 'load("me/x")')
    assert (tmp_path / "README.md").read_text() == "# Mine"
