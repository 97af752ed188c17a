import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_hf.tasks.sudoku import BoardShape, format_board, has_conflict, is_legal, parse_boards, parse_question
from relay_hf.tasks.sudoku.board import read_boards

LEGAL = {
    4: "1234341221434321",
    6: "123456456123231564564231312645645312",
    9: "123456789456789123789123456231564897564897231897231564312645978645978312978312645",
}


@pytest.mark.parametrize(("size", "height", "width"), [(4, 2, 2), (6, 2, 3), (9, 3, 3)])
def test_board_shape_of_size_boxes_cover_board(size, height, width):
    shape = BoardShape.of_size(size)
    assert (shape.box_height, shape.box_width, shape.cells) == (height, width, size * size)
    assert shape == BoardShape.of_cells(size * size)
    assert np.bincount(shape.units.ravel()).tolist() == [3] * shape.cells


def test_board_shape_units_of_6x6_are_rows_columns_boxes():
    units = BoardShape.of_size(6).units.tolist()
    assert units[1] == [6, 7, 8, 9, 10, 11]
    assert units[6] == [0, 6, 12, 18, 24, 30]
    assert units[13] == [3, 4, 5, 9, 10, 11]


def test_board_shape_unknown_size_raises():
    with pytest.raises(ValueError, match=r"`size=5`.*choose 4, 6 or 9"):
        BoardShape.of_size(5)


def test_board_shape_units_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        BoardShape.of_size(4).units[0, 0] = 7


@given(
    st.sampled_from([4, 6, 9]).flatmap(
        lambda size: st.text(".123456789"[: size + 1], min_size=size**2, max_size=size**2)
    )
)
def test_parse_boards_any_text_format_board_inverts(text):
    assert format_board(parse_boards([text])[0]) == text


def test_parse_question_zero_is_blank():
    assert np.array_equal(parse_question("1" + "0" * 15), parse_question("1" + "." * 15))


@pytest.mark.parametrize("length", [0, 15, 25, 80])
def test_parse_question_not_square_raises(length):
    with pytest.raises(ValueError, match=f"{length} characters is not square"):
        parse_question("." * length)


@pytest.mark.parametrize("letter", ["5", "x", " ", "\n", "é", "😀", "١"])
def test_parse_question_foreign_character_raises(letter):
    with pytest.raises(
        ValueError, match=r"Board 0 has .* in cell 3, but a 4x4 puzzle is written with the digits 1 to 4"
    ):
        parse_question("..." + letter + "." * 12)


@pytest.mark.parametrize("twin", [1, 4, 5], ids=["row", "column", "box"])
def test_parse_question_conflicting_clues_raises(twin):
    text = "".join("1" if cell in (0, twin) else "." for cell in range(16))
    with pytest.raises(ValueError, match="conflict"):
        parse_question(text)


def test_parse_boards_mixed_sizes_raises():
    with pytest.raises(ValueError, match="Board 1 has 36 characters, but a 4x4 board has 16"):
        parse_boards(["." * 16, "." * 36])


def test_parse_boards_no_text_raises():
    with pytest.raises(ValueError, match="no boards"):
        parse_boards([])


def test_parse_boards_solved_with_blank_raises():
    with pytest.raises(ValueError, match=r"Board 0 has '\.' in cell 15"):
        parse_boards([LEGAL[4][:-1] + "."], solved=True)


def test_read_boards_foreign_character_is_minus_one():
    assert read_boards(["1.04x5é?" + "." * 8], BoardShape.of_size(4))[0, :8].tolist() == [1, 0, 0, 4, -1, -1, -1, -1]


@pytest.mark.parametrize("size", [4, 6, 9])
def test_is_legal_one_cell_changed_is_illegal(size):
    board = parse_boards([LEGAL[size]])[0]
    assert is_legal(board)
    assert not has_conflict(board)
    changed = np.repeat(board[None], size * size, axis=0)  # one board per cell
    changed[np.arange(size * size), np.arange(size * size)] = board % size + 1
    assert not is_legal(changed).any()
    assert has_conflict(changed).all()


@pytest.mark.parametrize("value", [0, -1, 5, 100])
def test_is_legal_no_digit_of_the_board_is_illegal_without_conflict(value):
    board = parse_boards([LEGAL[4]])[0]
    board[6] = value
    assert not is_legal(board)
    assert not has_conflict(board)


def test_is_legal_latin_square_with_bad_boxes_is_illegal():
    assert not is_legal(parse_boards(["1234234134124123"])[0])
