import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_hf.tasks.sudoku import SudokuScores, score_solutions

QUESTION = "12.434..2..3...1"  # eight blanks
ANSWER = "1234341221434321"
OTHER = "2143432112343412"  # legal, but with other clues


def score(*solutions, question=QUESTION):
    return score_solutions([question] * len(solutions), [ANSWER] * len(solutions), solutions)


def test_score_solutions_right_answer_is_perfect():
    assert score(ANSWER) == SudokuScores(exact_match=1.0, cell_accuracy=1.0, legal=1.0, puzzles=1)


def test_score_solutions_two_blanks_wrong_counts_cells():
    swapped = ANSWER[:13] + "23" + ANSWER[15]  # 4231 for 4321
    assert score(ANSWER, swapped) == SudokuScores(exact_match=0.5, cell_accuracy=14 / 16, legal=0.5, puzzles=2)


def test_score_solutions_unfilled_puzzle_scores_nothing():
    assert score(QUESTION) == SudokuScores(exact_match=0.0, cell_accuracy=0.0, legal=0.0, puzzles=1)
    assert score(QUESTION.replace(".", "0")) == score(QUESTION)


def test_score_solutions_clues_changed_is_illegal():
    assert score(OTHER).legal == 0.0
    assert score(OTHER, question="." * 16).legal == 1.0
    assert score(OTHER, question="." * 16).exact_match == 0.0


def test_score_solutions_clue_broken_keeps_cell_accuracy():
    broken = "2" + ANSWER[1:]
    assert score(broken) == SudokuScores(exact_match=0.0, cell_accuracy=1.0, legal=0.0, puzzles=1)


@pytest.mark.parametrize("letter", [".", "0", "_", "5", "x", "é", "😀"])
def test_score_solutions_foreign_character_is_one_wrong_cell(letter):
    assert score(ANSWER[:2] + letter + ANSWER[3:]) == SudokuScores(0.0, 7 / 8, 0.0, 1)


@given(st.lists(st.tuples(st.integers(0, 15), st.sampled_from("1234.")), max_size=3))
def test_score_solutions_unique_puzzle_legal_iff_exact(changes):
    cells = list(ANSWER)
    for cell, letter in changes:
        cells[cell] = letter
    scores = score("".join(cells))
    assert scores.legal == scores.exact_match == float("".join(cells) == ANSWER)


@pytest.mark.parametrize("counts", [(1, 1, 2), (1, 2, 1), (2, 1, 1)])
def test_score_solutions_different_numbers_raise(counts):
    texts = [[text] * count for text, count in zip((QUESTION, ANSWER, ANSWER), counts, strict=True)]
    with pytest.raises(ValueError, match="one of each per puzzle"):
        score_solutions(*texts)


def test_score_solutions_solution_of_other_size_raises():
    with pytest.raises(ValueError, match="Board 0 has 15 characters"):
        score(ANSWER[:-1])


def test_score_solutions_answer_with_blank_raises():
    with pytest.raises(ValueError, match="4x4 solved board is written with"):
        score_solutions([QUESTION], [QUESTION], [QUESTION])


def test_score_solutions_nothing_to_score_raises():
    with pytest.raises(ValueError, match="no boards"):
        score_solutions([], [], [])
    with pytest.raises(ValueError, match="no blanks"):
        score(ANSWER, question=ANSWER)
