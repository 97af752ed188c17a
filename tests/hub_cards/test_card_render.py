"""The card: its numbers, its metadata, and that what is absent leaves no trace."""

import dataclasses
import itertools
import os
import re

import pytest
from huggingface_hub import ModelCard

from relay_hf.hub_cards import (
    DatasetFacts,
    Evaluation,
    RelayCardData,
    TrainingFacts,
    is_hub_id,
    render_card,
    save_card,
)

SECTIONS = {
    "usage": "## How to use",
    "evaluations": "## Evaluation",
    "training": "## Training",
    "limits": "## Limits",
    "citations": "## Citation",
}
TRAINING_PARTS = {
    "recipe": "1,000 steps from scratch",
    "datasets": "### Data",
    "arguments": "### Arguments",
    "versions": "## Framework versions",
}
EMPTY = RelayCardData("x")


def without(facts, *names):
    """The facts with some fields as if they had not been given."""
    empty = RelayCardData("x") if isinstance(facts, RelayCardData) else TrainingFacts()
    gone = {name: () if name == "citations" else getattr(empty, name) for name in names}
    return dataclasses.replace(facts, **gone)


def headings_without_content(text: str) -> list[str]:
    """Headings that are followed by nothing, or by a heading that is not below them."""
    lines = [line for line in re.sub(r"```.*?```", "code", text, flags=re.S).splitlines() if line]
    level = [len(line) - len(line.lstrip("#")) for line in [*lines, "# end"]]  # 0 = content
    return [line for line, own, following in zip(lines, level, level[1:], strict=False) if own and 0 < following <= own]


# -- text -------------------------------------------------------------------------------------------------------------


def test_table_holds_accuracy_and_each_kind_of_forwards_per_row(data):
    text = render_card(data)
    assert "| rollout | 0.15 | 86.8 | 96.1 | 7.13 | 17.13 | 27.13 |" in text
    assert "| relay | 0.05 | 93.8 | 96.1 | 7.94 | 17.94 | 27.94 |" in text
    assert "| Denoise forwards | Commit forwards | Prefill forwards |" in text


def test_highlighted_row_is_bold_and_said_in_words(data):
    text = render_card(data)
    assert "| **relay** | **0.25** | **60.8** | **96.1** | **5.07** | **15.07** | **25.07** |" in text
    assert "(relay, threshold 0.25): exact match 60.8 % at 5.07 denoise, 15.07 commit and 25.07 prefill" in text


def test_table_rows_have_as_many_cells_as_the_header(data):
    for table in re.findall(r"(?:^\|.*\n)+", render_card(data), flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_seeds_and_spread_are_printed(data, make_row):
    rows = [make_row("relay", 0.1, 0.797, 5.0, seeds=3, spread={"exact_match": 0.0123})]
    text = render_card(dataclasses.replace(data, evaluations=[Evaluation(DatasetFacts("S"), rows, rows[0])]))
    assert "**79.7 ± 1.2**" in text
    assert "mean over 3 training seeds (± one standard deviation)" in text


def test_samples_that_differ_get_a_column(data, make_row):
    rows = [make_row("a", 0.1, 0.5, 5.0, samples=10), make_row("b", 0.1, 0.5, 5.0, samples=20)]
    text = render_card(dataclasses.replace(data, evaluations=[Evaluation(DatasetFacts("S"), rows, rows[0])]))
    assert "| Samples |" in text
    assert "| 25.00 | 20 |" in text


def test_rows_without_threshold_need_no_column(data, make_row):
    rows = [make_row("a", None, 0.5, 5.0)]
    assert "Threshold" not in render_card(
        dataclasses.replace(data, evaluations=[Evaluation(DatasetFacts("S"), rows, rows[0])])
    )


def test_training_facts_are_printed(data):
    text = render_card(data)
    for part in (
        "| `learning_rate` | `5e-06` |",
        "| `packing` | `False` |",
        "- Steps: 1,400",
        "- Wall time since the last start: 1 h 02 min",
    ):
        assert part in text
    assert "- Trained parameters: 345,678\n- Hardware: 2 CPU cores" in text
    assert "- torch: 2.13.0\n- relay_hf: 0.1.0" in text
    assert "max_grad_norm" not in text  # its value is None


def test_pipe_in_a_value_does_not_break_the_table(data):
    assert "| `tags` | `a\\|b` |" in render_card(data)


def test_introduction_says_origin_objective_and_channel(data):
    text = render_card(data)
    assert "adapted from [org/base-model](https://huggingface.co/org/base-model) on Sudoku 6x6" in text
    assert "objective `relay` (back-propagation through two steps)" in text
    assert "the last hidden state through a LayerNorm." in text
    assert "relay channel, trained on Sudoku 6x6" in render_card(without(data, "base_model")), "from what is not known"


def test_model_without_channel_claims_none(data):
    text = render_card(without(data, "channel"))
    assert "with a relay channel" not in text
    assert "carries" not in text
    assert "relay" not in ModelCard(render_card(RelayCardData("x"))).data.tags


def test_base_folder_is_named_without_its_path(data, tmp_path):
    text = render_card(dataclasses.replace(data, base_model=str(tmp_path / "warm-up")))
    assert "adapted from `warm-up`" in text
    assert str(tmp_path) not in text


def test_usage_is_printed_as_it_stands(data):
    assert "```python\nprint('<a & b> {{ c }}')\n```" in render_card(data)


def test_card_cites_relay():
    text = render_card(EMPTY)
    assert "https://arxiv.org/abs/2605.22967" in text
    assert text.count("```") == 2


# -- absence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SECTIONS)
def test_section_is_there_only_with_its_data(data, name):
    assert f"\n{SECTIONS[name]}\n" in render_card(data)
    assert SECTIONS[name] not in render_card(without(data, name))


@pytest.mark.parametrize("name", TRAINING_PARTS)
def test_part_of_training_is_there_only_with_its_data(data, name):
    assert TRAINING_PARTS[name] in render_card(data)
    assert TRAINING_PARTS[name] not in render_card(dataclasses.replace(data, training=without(data.training, name)))


def test_training_that_knows_nothing_leaves_no_heading(data):
    assert "## Training" not in render_card(dataclasses.replace(data, training=TrainingFacts()))


@pytest.mark.parametrize("count", range(len(SECTIONS) + 1))
def test_card_with_any_sections_missing_is_tidy(data, count):
    for names in itertools.combinations(SECTIONS, count):
        text = render_card(without(data, *names))
        assert "\n\n\n" not in text, names
        assert "None" not in text, names
        assert text.endswith("\n"), names
        assert not text.endswith("\n\n"), names
        assert all(line == line.rstrip() for line in text.splitlines()), names
        assert not headings_without_content(text), names


@pytest.mark.parametrize("count", range(len(TRAINING_PARTS) + 1))
def test_training_with_any_parts_missing_is_tidy(data, count):
    for names in itertools.combinations(TRAINING_PARTS, count):
        training = without(data.training, *names, "steps", "seconds", "parameters", "hardware")
        text = render_card(dataclasses.replace(data, training=training))
        assert "\n\n\n" not in text, names
        assert "None" not in text, names
        assert "### Run" not in text, names


def test_blank_lines_in_given_paragraphs_do_not_pile_up(data):
    training = dataclasses.replace(data.training, recipe="\n\nOne.\n\n\n\nTwo.\n\n")
    assert "\nOne.\n\nTwo.\n\n### Data" in render_card(dataclasses.replace(data, training=training))


# -- metadata ---------------------------------------------------------------------------------------------------------


def test_metadata_parses_back(data):
    metadata = ModelCard(render_card(data)).data
    assert metadata.library_name == "transformers"
    assert metadata.license == "apache-2.0"
    assert metadata.language == ["en"]
    assert metadata.pipeline_tag == "text-generation"
    assert metadata.base_model == "org/base-model"
    assert metadata.datasets == ["org/sudoku"]
    assert metadata.tags == ["relay_hf", "masked-diffusion", "text-diffusion", "relay", "sudoku"]


def test_metadata_of_bare_card_holds_nothing_unknown():
    assert set(ModelCard(render_card(EMPTY)).data.to_dict()) == {"library_name", "model_name", "tags"}


def test_model_index_round_trip_keeps_own_numbers_only(data):
    metadata = ModelCard(render_card(data)).data
    assert metadata.model_name == "sudoku-relay"
    found = {(r.metric_type, r.metric_args["unmasking_threshold"]): r for r in metadata.eval_results}
    assert {key: r.metric_value for key, r in found.items()} == {
        ("exact_match", 0.05): 0.938,
        ("cell_accuracy", 0.05): 0.9612,
        ("exact_match", 0.25): 0.608,
        ("cell_accuracy", 0.25): 0.9612,
    }
    result = found["exact_match", 0.25]
    assert result.metric_args == {
        "unmasking_threshold": 0.25,
        "denoise_forwards": 5.07,
        "commit_forwards": 15.07,
        "prefill_forwards": 25.07,
        "samples": 500,
        "seeds": 1,
    }
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("org/sudoku", "6x6", "test")
    assert result.task_type == "text-generation"


def test_model_index_names_tell_thresholds_apart(data):
    names = [result.metric_name for result in ModelCard(render_card(data)).data.eval_results]
    assert len(set(names)) == 4
    assert "exact match (threshold 0.25, 5.07 denoise forwards)" in names


def test_model_index_of_local_dataset_has_a_plain_id(data):
    evaluation = dataclasses.replace(data.evaluations[0], dataset=DatasetFacts("Sudoku 6×6 (ours)"))
    metadata = ModelCard(render_card(dataclasses.replace(data, evaluations=[evaluation]))).data
    assert {result.dataset_type for result in metadata.eval_results} == {"sudoku-6-6-ours"}
    assert {result.dataset_name for result in metadata.eval_results} == {"Sudoku 6×6 (ours)"}


def test_numbers_of_numpy_become_plain_yaml(data, make_row):
    import numpy as np

    rows = [make_row("relay", np.float32(0.5), np.float64(0.25), np.float64(5.0), samples=np.int64(7))]
    training = dataclasses.replace(data.training, arguments={"lr": np.float64(5e-4)})
    text = render_card(
        dataclasses.replace(data, training=training, evaluations=[Evaluation(DatasetFacts("S"), rows, rows[0])])
    )
    assert "numpy" not in text
    assert "| `lr` | `0.0005` |" in text


@pytest.mark.parametrize("name", [None, "gpt2", "./model", "/tmp/model", "a/b/c", "org/bad name", "org/-x", "org/"])
def test_base_model_that_is_no_hub_id_stays_out_of_metadata(data, name):
    assert not is_hub_id(name)
    assert ModelCard(render_card(dataclasses.replace(data, base_model=name))).data.base_model is None


def test_existing_folder_is_no_hub_id(tmp_path, monkeypatch):
    assert is_hub_id("runs/warm-up")
    (tmp_path / "runs" / "warm-up").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("runs/warm-up")


# -- file -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "accuracy.png").write_bytes(b"png")
    return tmp_path


def test_saved_card_is_the_rendered_text_beside_the_picture(data, folder):
    path = save_card(data, folder)
    assert path == folder / "README.md"
    assert path.read_text(encoding="utf-8") == render_card(data)
    assert "](accuracy.png)" in path.read_text(encoding="utf-8")
    assert ModelCard.load(path).data.model_name == "sudoku-relay"
    assert sorted(os.listdir(folder)) == ["README.md", "accuracy.png"]


def test_saved_card_replaces_the_old_one_and_is_readable_by_all(data, folder):
    (folder / "README.md").write_text("old")
    old_umask = os.umask(0o022)
    try:
        path = save_card(data, folder)
    finally:
        os.umask(old_umask)
    assert path.read_text(encoding="utf-8").startswith("---\n")
    assert path.stat().st_mode & 0o777 == 0o644


def test_save_that_fails_keeps_the_old_card(data, folder, monkeypatch):
    (folder / "README.md").write_text("old")

    def refuse(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        save_card(data, folder)
    assert (folder / "README.md").read_text() == "old"
    assert sorted(os.listdir(folder)) == ["README.md", "accuracy.png"]


def test_save_without_the_picture_raises_and_writes_nothing(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"accuracy\.png.*write the picture there"):
        save_card(data, tmp_path)
    assert os.listdir(tmp_path) == []


def test_save_makes_the_folder(tmp_path):
    assert save_card(EMPTY, tmp_path / "new" / "model").is_file()
