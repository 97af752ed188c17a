from itertools import islice

import pytest

from relay_hf.tasks.sudoku import count_solutions, generate_puzzles, generator


def without_each_clue(question):
    return [question[:cell] + "." + question[cell + 1 :] for cell, clue in enumerate(question) if clue != "."]


@pytest.mark.parametrize("fixture", ["puzzles4", "puzzles6"])
def test_generate_puzzles_answer_is_only_solution(fixture, oracle, request):
    for row in request.getfixturevalue(fixture).select(range(20)):
        assert list(islice(oracle(row["question"]), 2)) == [row["answer"]]


@pytest.mark.parametrize("fixture", ["puzzles4", "puzzles6"])
def test_generate_puzzles_any_clue_removed_is_ambiguous(fixture, oracle, request):
    for question in request.getfixturevalue(fixture)["question"][:10]:
        assert all(len(list(islice(oracle(fewer), 2))) == 2 for fewer in without_each_clue(question))


def test_generate_puzzles_9x9_is_unique_and_minimal():
    for question in generate_puzzles(3, size=9, progress=False)["question"]:
        assert count_solutions(question) == 1
        assert all(count_solutions(fewer) == 2 for fewer in without_each_clue(question))


def test_generate_puzzles_are_distinct():
    questions = generate_puzzles(1500, size=4, progress=False)["question"][:]
    assert len(set(questions)) == 1500


def test_generate_puzzles_reach_every_4x4_board():
    answers = generate_puzzles(3000, size=4, progress=False)["answer"][:]
    assert len(set(answers)) == 288


def test_generate_puzzles_same_seed_larger_count_appends(puzzles6):
    assert generate_puzzles(5, size=6, seed=2, progress=False)[:] == puzzles6[:5]


def test_generate_puzzles_other_seed_other_puzzles(puzzles6):
    other = generate_puzzles(60, size=6, seed=3, progress=False)
    assert not set(other["question"][:]) & set(puzzles6["question"][:])


def test_generate_puzzles_extra_clues_keep_answer_and_add_clues(puzzles6):
    easy = generate_puzzles(1, size=6, seed=2, progress=False, extra_clues=5)[0]
    hard = puzzles6[0]
    assert easy["answer"] == hard["answer"]
    assert easy["question"].count(".") == hard["question"].count(".") - 5
    assert all(clue in (".", kept) for clue, kept in zip(hard["question"], easy["question"], strict=True))
    assert count_solutions(easy["question"]) == 1


def test_generate_puzzles_progress_bar_is_shown_only_on_request(capsys):
    generate_puzzles(1, size=4, progress=False)
    assert capsys.readouterr().err == ""
    generate_puzzles(1, size=4)
    assert "Sudoku 4x4" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"count": 0}, {"extra_clues": -1}, {"extra_clues": 16}, {"size": 8}])
def test_generate_puzzles_bad_option_raises(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"`{name}={value}`"):
        generate_puzzles(**{"count": 1, "size": 4, "progress": False} | options)


def test_generate_puzzles_more_extra_clues_than_blanks_raises():
    with pytest.raises(ValueError, match=r"`extra_clues=13` is more than the .* blanks"):
        generate_puzzles(1, size=4, progress=False, extra_clues=13)


def test_generate_puzzles_used_up_raises(monkeypatch):
    monkeypatch.setattr(generator, "_PATIENCE", 1)
    with pytest.raises(ValueError, match=r"Only .* distinct 4x4 puzzles turned up, not `count=100000`"):
        generate_puzzles(100_000, size=4, progress=False)
