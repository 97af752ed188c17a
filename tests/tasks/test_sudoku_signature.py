from itertools import permutations, product

import numpy as np
import pytest
from datasets import Dataset

from relay_hf.tasks.sudoku import (
    augment_puzzles,
    generate_puzzles,
    parse_boards,
    random_symmetry,
    split_puzzles,
    symmetry_signature,
    symmetry_signatures,
    write_boards,
)

LINES4 = [
    (*a, *b) for one, two in [((0, 1), (2, 3)), ((2, 3), (0, 1))] for a in permutations(one) for b in permutations(two)
]


def canonical4(question):
    """The smallest of all twins of a 4x4 question, digits renamed in order of appearance: equal for twins only."""
    twins = []
    for rows, columns, transposed in product(LINES4, LINES4, (False, True)):
        cells = [question[4 * row + column] for row in rows for column in columns]
        if transposed:
            cells = [cells[4 * column + row] for row in range(4) for column in range(4)]
        names = {".": "."}
        twins.append("".join(names.setdefault(cell, str(len(names))) for cell in cells))
    return min(twins)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_symmetry_signatures_random_symmetry_keeps_them(size):
    questions = generate_puzzles(10, size=size, progress=False)["question"][:]
    boards = np.repeat(parse_boards(questions)[:, None], 30, axis=0)  # (300, 1, cells)
    twins = write_boards(random_symmetry(boards, np.random.default_rng(0))[:, 0])
    assert np.array_equal(symmetry_signatures(twins), np.repeat(symmetry_signatures(questions), 30))


def test_symmetry_signatures_4x4_tell_apart_exactly_the_classes(puzzles4):
    questions = puzzles4["question"][:]
    classes = [canonical4(question) for question in questions]
    pairs = set(zip(symmetry_signatures(questions).tolist(), classes, strict=True))
    assert len(pairs) == len(set(classes)) == len({signature for signature, _ in pairs})


def test_symmetry_signatures_other_clue_digit_differs(puzzles6):
    question = puzzles6["question"][0]
    cell = next(cell for cell, clue in enumerate(question) if clue != "." and question.count(clue) > 1)
    unused = next(digit for digit in "123456" if digit != question[cell])
    assert symmetry_signature(question) != symmetry_signature(question[:cell] + unused + question[cell + 1 :])


def test_symmetry_signatures_6x6_transposed_cells_are_no_twin():
    row = "12...." + "." * 30
    column = "1....." + "2....." + "." * 24
    assert symmetry_signature(row) != symmetry_signature(column)
    assert symmetry_signature("12.." + "." * 12) == symmetry_signature("1..." + "2..." + "." * 8)


def test_symmetry_signature_alone_equals_batch_and_never_changes(puzzles6):
    questions = puzzles6["question"][:]
    assert [int(symmetry_signature(question), 16) for question in questions] == symmetry_signatures(questions).tolist()
    assert len({symmetry_signature(question) for question in questions}) == 60
    assert symmetry_signature("12.434..2..3...1") == "a439cbe580808aa4"


def test_symmetry_signature_bad_text_raises():
    with pytest.raises(ValueError, match="not square"):
        symmetry_signature("...")


def test_split_puzzles_with_many_twins_shares_no_signature(puzzles6):
    twins = augment_puzzles(puzzles6, rows=600)
    parts = split_puzzles(twins, test_count=95)
    train, test = (set(symmetry_signatures(parts[name]["question"][:]).tolist()) for name in ("train", "test"))
    assert not train & test
    assert len(train) == 50
    assert len(test) == 10
    assert (len(parts["train"]), len(parts["test"])) == (500, 95)  # the last five twins of the tenth puzzle are dropped


def test_split_puzzles_without_twins_keeps_every_row(puzzles6):
    parts = split_puzzles(puzzles6, test_count=13)
    rows = [row["question"] for part in parts.values() for row in part]
    assert sorted(rows) == sorted(puzzles6["question"][:])
    assert parts["test"].num_rows == 13
    assert parts["test"].column_names == puzzles6.column_names


def test_split_puzzles_seed_decides(puzzles6):
    first, again, other = (split_puzzles(puzzles6, 10, seed=seed)["test"][:] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_split_puzzles_no_test_raises(puzzles6):
    with pytest.raises(ValueError, match="`test_count=0`"):
        split_puzzles(puzzles6, 0)


def test_split_puzzles_nothing_left_to_train_raises(puzzles6):
    with pytest.raises(ValueError, match=r"`test_count=60` of 60 puzzles \(60 signatures\) leaves none"):
        split_puzzles(puzzles6, 60)
    same = Dataset.from_dict({"question": ["." * 16] * 4})
    with pytest.raises(ValueError, match=r"\(1 signatures\)"):
        split_puzzles(same, 1)
