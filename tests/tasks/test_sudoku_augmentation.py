import numpy as np
import pytest
from datasets import Dataset

from relay_hf.tasks.sudoku import (
    augment_puzzles,
    generate_puzzles,
    is_legal,
    parse_boards,
    random_symmetry,
    solve,
    symmetry_signatures,
)


def test_augment_puzzles_twins_are_legal_and_keep_their_clues(puzzles6):
    twins = augment_puzzles(puzzles6, rows=500)
    questions, answers = parse_boards(twins["question"][:]), parse_boards(twins["answer"][:])
    assert is_legal(answers).all()
    assert ((questions == 0) | (questions == answers)).all()


def test_augment_puzzles_answer_is_the_solution(puzzles6):
    for row in augment_puzzles(puzzles6, rows=20, seed=4):
        assert solve(row["question"]) == row["answer"]


def test_augment_puzzles_every_round_has_each_puzzle_once(puzzles6):
    twins = augment_puzzles(puzzles6, rows=150)  # two and a half rounds of 60
    signatures = symmetry_signatures(twins["question"][:])
    originals = np.sort(symmetry_signatures(puzzles6["question"][:]))
    assert np.array_equal(np.sort(signatures[:60]), originals)
    assert np.array_equal(np.sort(signatures[60:120]), originals)
    assert not np.array_equal(signatures[:60], signatures[60:120])
    assert len(twins) == 150


def test_augment_puzzles_one_puzzle_gives_many_twins(puzzles6):
    twins = augment_puzzles(puzzles6.select([0]), rows=300)
    assert len(set(twins["question"][:])) > 290


def test_augment_puzzles_seed_decides(puzzles6):
    first, again, other = (augment_puzzles(puzzles6, rows=70, seed=seed)[:] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_augment_puzzles_chunks_do_not_repeat_symmetries(puzzles4, monkeypatch):
    monkeypatch.setattr("relay_hf.tasks.sudoku.augmentation._CHUNK", 7)
    twins = augment_puzzles(puzzles4.select([0]), rows=20)
    assert len(twins) == 20
    assert twins["question"][:7] != twins["question"][7:14]


def test_augment_puzzles_no_rows_raises(puzzles6):
    with pytest.raises(ValueError, match="`rows=0`"):
        augment_puzzles(puzzles6, rows=0)


def test_augment_puzzles_answer_with_blank_raises(tiny):
    question, _ = tiny
    with pytest.raises(ValueError, match="4x4 solved board is written with"):
        augment_puzzles(Dataset.from_dict({"question": [question], "answer": [question]}), rows=1)


@pytest.mark.parametrize(("size", "orbit"), [(4, 288), (6, None), (9, None)])
def test_random_symmetry_stays_among_legal_boards_and_reaches_both_classes(size, orbit):
    answers = parse_boards(generate_puzzles(2, size=size, progress=False)["answer"][:])
    boards = np.repeat(answers[:, None], 2000, axis=0)  # (4000, 1, cells)
    moved = random_symmetry(boards, np.random.default_rng(0))
    assert moved.dtype == boards.dtype
    assert is_legal(moved).all()
    reached = len({board.tobytes() for board in moved[:2000]})
    assert reached in (96, 192) if orbit else reached > 1900  # 4x4 boards fall into two classes of 96 and 192


def test_random_symmetry_transposes_only_square_boxes():
    for size, transposes in [(4, True), (6, False), (9, True)]:
        board = np.zeros((400, 1, size * size), np.int8)
        board[:, 0, :size] = np.arange(1, size + 1)  # one full row
        moved = random_symmetry(board, np.random.default_rng(0)).reshape(-1, size, size)
        full_rows = (moved > 0).all(2).any(1)
        assert full_rows.all() != transposes
        assert 0.4 < full_rows.mean() < 0.6 or not transposes


def test_random_symmetry_group_moves_together(puzzles6):
    board = parse_boards(puzzles6["answer"][:])[:, None]  # (60, 1, cells)
    moved = random_symmetry(np.concatenate([board, board], axis=1), np.random.default_rng(0))
    assert np.array_equal(moved[:, 0], moved[:, 1])
    assert not np.array_equal(moved[:, :1], board)
