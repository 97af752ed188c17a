from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_hf.tasks.sudoku import count_solutions, solve

CLASSIC = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
CLASSIC_ANSWER = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
SEVENTEEN = "000000010400000000020000000000050407008000300001090000300400200050100000000806000"


def test_solve_classic_puzzle_gives_known_answer():
    assert solve(CLASSIC) == CLASSIC_ANSWER


def test_solve_seventeen_clues_keeps_them():
    answer = solve(SEVENTEEN)
    assert all(clue in ("0", digit) for clue, digit in zip(SEVENTEEN, answer, strict=True))
    assert count_solutions(SEVENTEEN) == 1


def test_solve_full_board_returns_it():
    assert solve(CLASSIC_ANSWER) == CLASSIC_ANSWER


def test_count_solutions_empty_4x4_board_is_288():
    assert count_solutions("." * 16, limit=1000) == 288


def test_count_solutions_stops_at_limit():
    assert [count_solutions("." * 81, limit=limit) for limit in (1, 2, 7)] == [1, 2, 7]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, 15), st.sampled_from("1234"), max_size=7))
def test_count_solutions_any_4x4_clues_agrees_with_oracle(oracle, clues):
    text = "".join(clues.get(cell, ".") for cell in range(16))
    try:
        count = count_solutions(text, limit=300)
    except ValueError:
        return  # clues that conflict are the board's tests
    assert count == sum(1 for _ in oracle(text))


def test_count_solutions_6x6_with_clues_removed_agrees_with_oracle(puzzles6, oracle):
    for question in puzzles6["question"][:5]:
        fewer = question.replace(max(question), ".")
        assert count_solutions(fewer, limit=20) == len(list(islice(oracle(fewer), 20)))


def test_count_solutions_zero_limit_raises():
    with pytest.raises(ValueError, match="`limit=0`"):
        count_solutions("." * 16, limit=0)


def test_solve_no_solution_raises():
    with pytest.raises(ValueError, match="no solution"):
        solve("123....4........")


def test_solve_two_solutions_raises():
    with pytest.raises(ValueError, match="more than one solution"):
        solve("." * 16)


def test_solve_conflicting_clues_raises():
    with pytest.raises(ValueError, match="conflict"):
        solve("11" + "." * 14)
