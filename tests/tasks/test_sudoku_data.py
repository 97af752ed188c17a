import numpy as np
import pytest
import torch
from datasets import Dataset

from relay_hf.tasks.sudoku import data, load_sudoku, make_sudoku_tokenizer, questions_to_ids, to_features

Q, A = "12.434..2..3...1", "1234341221434321"
Q2, A2 = "0200001000300004", "2" * 16


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write_csv(tmp_path):
    def write(*rows, header="question,answer"):
        path = tmp_path / "puzzles.csv"
        path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n", encoding="utf-8")
        return path

    return write


def test_load_sudoku_csv_reads_rows(write_csv):
    dataset = load_sudoku(write_csv((Q, A), (A, A)))
    assert dataset[:] == {"question": [Q, A], "answer": [A, A]}


def test_load_sudoku_csv_other_columns_and_order_are_ignored(write_csv):
    path = write_csv(("web", A, "7", Q), header="source,answer,rating,question")
    assert load_sudoku(str(path))[:] == {"question": [Q], "answer": [A]}


def test_load_sudoku_csv_of_digits_keeps_leading_zeros(write_csv):
    dataset = load_sudoku(write_csv(("0" + A[1:], A)))
    assert dataset[0] == {"question": "." + A[1:], "answer": A}


def test_load_sudoku_written_by_dataset_round_trips(puzzles6, tmp_path):
    puzzles6.to_csv(tmp_path / "made.csv")
    assert load_sudoku(tmp_path / "made.csv", size=6, check_unique=True)[:] == puzzles6[:]


def test_load_sudoku_limit_takes_first_rows_only(write_csv):
    path = write_csv((Q, A), (A, A), ("bad", "row"))
    assert load_sudoku(path, limit=2)["question"][:] == [Q, A]
    assert len(load_sudoku(write_csv((Q, A)), limit=9)) == 1


def test_load_sudoku_hub_id_asks_for_split_and_keeps_two_columns(monkeypatch):
    asked = []

    def fake_load_dataset(name, split):
        asked.append((name, split))
        return Dataset.from_dict({"rating": [3], "question": [Q], "answer": [A]})

    monkeypatch.setattr(data, "load_dataset", fake_load_dataset)
    assert load_sudoku("someone/sudoku", split="test")[:] == {"question": [Q], "answer": [A]}
    assert asked == [("someone/sudoku", "test")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((Q[:-1], A), "question must have 16 characters"),
        ((Q, A + "1"), "answer must have 16 characters"),
        (("", A), "question must have 16 characters"),
        (("x" + Q[1:], A), "question may only have the digits 1 to 4"),
        (("5" + Q[1:], A), "question may only have the digits 1 to 4"),
        ((Q, Q), "answer may only have the digits 1 to 4"),
        (("11" + "." * 14, A), "question must not have a digit twice"),
        ((Q, A[:-1] + "2"), "answer must have each digit once"),
        (("2" + "." * 15, A), "answer must keep the clues"),
    ],
)
def test_load_sudoku_bad_row_raises_naming_it(write_csv, row, message):
    with pytest.raises(ValueError, match=rf"Row 2 \(counting from 0\).*{message}"):
        load_sudoku(write_csv((Q, A), (A, A), row, row))


def test_load_sudoku_row_number_counts_beyond_first_batch(write_csv):
    with pytest.raises(ValueError, match="Row 10500 "):
        load_sudoku(write_csv(*[(Q, A)] * 10_500, (Q, Q)))


def test_load_sudoku_first_row_not_square_raises(write_csv):
    with pytest.raises(ValueError, match=r"Row 0 .*15 characters is not square"):
        load_sudoku(write_csv((Q[:-1], A)))


def test_load_sudoku_other_size_raises(write_csv):
    with pytest.raises(ValueError, match=r"Row 0 .*must have 81 characters for a 9x9 board"):
        load_sudoku(write_csv((Q, A)), size=9)


def test_load_sudoku_several_solutions_raises_only_if_asked(write_csv):
    path = write_csv((Q, A), ("1" + "." * 15, A))
    assert len(load_sudoku(path)) == 2
    with pytest.raises(ValueError, match=r"Row 1 .*one solution, but it has more"):
        load_sudoku(path, check_unique=True)


def test_load_sudoku_missing_column_raises(write_csv):
    with pytest.raises(ValueError, match="no column 'answer'"):
        load_sudoku(write_csv((Q, A), header="question,solution"))


def test_load_sudoku_hub_missing_column_raises(monkeypatch):
    monkeypatch.setattr(data, "load_dataset", lambda name, split: Dataset.from_dict({"text": ["hello"]}))
    with pytest.raises(ValueError, match=r"'someone/text' has no column 'question' \(it has \['text'\]\)"):
        load_sudoku("someone/text")


def test_load_sudoku_missing_file_raises(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        load_sudoku(tmp_path / "none.csv")


def test_load_sudoku_no_rows_raises(write_csv):
    with pytest.raises(ValueError, match="has no puzzles"):
        load_sudoku(write_csv())


def test_load_sudoku_zero_limit_raises(write_csv):
    with pytest.raises(ValueError, match="`limit=0`"):
        load_sudoku(write_csv((Q, A)), limit=0)


def test_to_features_labels_are_answers_at_blanks(puzzles6):
    tokenizer = make_sudoku_tokenizer(6)
    features = to_features(puzzles6, tokenizer)
    assert features.column_names == ["input_ids", "labels"]
    for row, feature in zip(puzzles6, features, strict=True):
        ids = tokenizer.encode(row["answer"])
        assert feature["input_ids"] == ids
        assert feature["labels"] == [
            token if cell == "." else -100 for token, cell in zip(ids, row["question"], strict=True)
        ]


def test_to_features_tokenizer_of_larger_board_gives_the_same(puzzles4):
    assert to_features(puzzles4, make_sudoku_tokenizer(9))[:] == to_features(puzzles4, make_sudoku_tokenizer(4))[:]


def test_to_features_tokenizer_of_smaller_board_raises(puzzles6):
    with pytest.raises(ValueError, match=r"lacks the digit 5 .*make_sudoku_tokenizer\(6\)"):
        to_features(puzzles6, make_sudoku_tokenizer(4))


def test_to_features_answer_with_blank_raises():
    with pytest.raises(ValueError, match="4x4 solved board is written with"):
        to_features(Dataset.from_dict({"question": [Q], "answer": [Q]}), make_sudoku_tokenizer(4))


def test_to_features_no_rows_raises():
    with pytest.raises(ValueError, match="no puzzles"):
        to_features(Dataset.from_dict({"question": [], "answer": []}), make_sudoku_tokenizer(4))


def test_questions_to_ids_equals_tokenizer(puzzles6):
    tokenizer = make_sudoku_tokenizer(6)
    ids = questions_to_ids(puzzles6["question"][:], tokenizer)
    assert ids.dtype == torch.long
    assert ids.tolist() == [tokenizer.encode(question) for question in puzzles6["question"]]


def test_questions_to_ids_zero_is_the_mask():
    ids = questions_to_ids([Q.replace(".", "0")], make_sudoku_tokenizer(4))
    assert np.array_equal((ids[0] == 1).numpy(), [cell == "." for cell in Q])


def test_questions_to_ids_tokenizer_without_mask_raises():
    tokenizer = make_sudoku_tokenizer(4)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        questions_to_ids([Q], tokenizer)
