"""Sudoku boards: their shape, text to digits and back, and the rules.

A board of size S is written row by row as one string of S * S characters: the digits "1".."S", and "." (or "0") for a
blank. In numpy it is (S * S,) int8 with 0 for a blank, and N boards are (N, S * S).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

BLANKS = ".0"
_BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size -> rows and columns of one box


@dataclass(frozen=True)
class BoardShape:
    """How a board is cut up: `size` rows, columns and boxes; a box has `box_height` rows and `box_width` columns."""

    size: int
    box_height: int
    box_width: int

    @classmethod
    def of_size(cls, size: int) -> "BoardShape":
        """The shape of a `size` x `size` board.

        Raises: ValueError if the size is not 4, 6 or 9.
        """
        if size not in _BOXES:
            raise ValueError(f"`size={size}` has no Sudoku board here: choose 4, 6 or 9.")
        return cls(size, *_BOXES[size])

    @classmethod
    def of_cells(cls, cells: int) -> "BoardShape":
        """The shape of a board of that many cells, which is also the length of its text.

        Raises: ValueError if no supported board has that many cells.
        """
        for size in _BOXES:
            if size * size == cells:
                return cls.of_size(size)
        raise ValueError(
            f"A puzzle of {cells} characters is not square: write 16 (4x4), 36 (6x6) or 81 (9x9), row by row."
        )

    @property
    def cells(self) -> int:
        """Number of cells, S * S."""
        return self.size * self.size

    @property
    def square_boxes(self) -> bool:
        """Whether boxes are square, so that the transpose of a legal board is legal too."""
        return self.box_height == self.box_width

    @cached_property
    def units(self) -> np.ndarray:
        """(3 * S, S) int64: the cells of every row, then of every column, then of every box."""
        grid = np.arange(self.cells).reshape(self.size, self.size)
        boxes = grid.reshape(self.size // self.box_height, self.box_height, self.size // self.box_width, self.box_width)
        units = np.concatenate([grid, grid.T, boxes.swapaxes(1, 2).reshape(self.size, self.size)])
        units.flags.writeable = False  # shared by all callers of this shape
        return units


def read_boards(texts: Sequence[str], shape: BoardShape) -> np.ndarray:
    """Read texts without judging their characters.

    Returns: (N, cells) int8: the digits, 0 for a blank, -1 for any other character.
    Raises: ValueError if a text has not the length of the board.
    """
    for index, text in enumerate(texts):
        if len(text) != shape.cells:
            raise ValueError(
                f"Board {index} has {len(text)} characters, but a {shape.size}x{shape.size} board has {shape.cells}: "
                "give boards of one size."
            )
    codes = np.frombuffer("".join(texts).encode("ascii", "replace"), np.uint8)  # "?" for what is not ASCII
    return _digit_of_code(shape.size)[codes].reshape(-1, shape.cells)


def parse_boards(texts: Sequence[str], shape: BoardShape | None = None, solved: bool = False) -> np.ndarray:
    """Read texts of digits and blanks; without a shape, the length of the first text decides.

    Args: solved: refuse blanks, as in an answer.
    Returns: (N, cells) int8, 0 for a blank.
    Raises: ValueError for no text, for a text of the wrong length, or for a character that is no digit of the board.
    """
    if len(texts) == 0:
        raise ValueError("There are no boards to read: give at least one text.")
    shape = shape or BoardShape.of_cells(len(texts[0]))
    boards = read_boards(texts, shape)
    foreign = boards < (1 if solved else 0)
    if foreign.any():
        index, cell = np.argwhere(foreign)[0]
        kind, blanks = ("solved board", "") if solved else ("puzzle", ', and "." or "0" for a blank')
        raise ValueError(
            f"Board {index} has {texts[index][cell]!r} in cell {cell}, but a {shape.size}x{shape.size} {kind} is "
            f"written with the digits 1 to {shape.size}{blanks}: correct the text."
        )
    return boards


def parse_question(text: str) -> np.ndarray:
    """Read one puzzle.

    Returns: (cells,) int8, 0 for a blank.
    Raises: ValueError if the text is not square, has a foreign character, or if two clues contradict each other.
    """
    board = parse_boards([text])[0]
    if has_conflict(board):
        raise ValueError(
            f"The clues of {text!r} conflict: a row, column or box holds a digit twice, so no solution exists; "
            "correct the clues."
        )
    return board


def write_boards(boards: np.ndarray) -> list[str]:
    """The texts of (N, cells) boards of digits, "." for 0; the inverse of `parse_boards`."""
    cells = boards.shape[-1]
    letters = np.frombuffer(b".123456789", np.uint8)[boards].tobytes().decode("ascii")
    return [letters[start : start + cells] for start in range(0, len(letters), cells)]


def format_board(board: np.ndarray) -> str:
    """The text of one (cells,) board, "." for 0; the inverse of `parse_question`."""
    return write_boards(board[None])[0]


def is_legal(boards: np.ndarray) -> np.ndarray:
    """Whether every row, column and box has each digit exactly once.

    Args: boards: (..., cells) integers; anything but 1..S (a blank, a foreign character) makes a board illegal.
    Returns: (...) bool.
    """
    shape = BoardShape.of_cells(boards.shape[-1])
    every_digit = (1 << shape.size) - 1
    bits = _digit_bits(boards, shape)[..., shape.units]  # (..., 3 * S, S)
    return (np.bitwise_or.reduce(bits, axis=-1) == every_digit).all(-1)  # S cells show S digits: each exactly once


def has_conflict(boards: np.ndarray) -> np.ndarray:
    """Whether some row, column or box has a digit more than once; blanks never conflict.

    Args: boards: (..., cells) integers, 0 for a blank.
    Returns: (...) bool.
    """
    shape = BoardShape.of_cells(boards.shape[-1])
    bits = _digit_bits(boards, shape)[..., shape.units]  # (..., 3 * S, S)
    return (bits.sum(-1) != np.bitwise_or.reduce(bits, axis=-1)).any(-1)  # distinct powers of two: sum == or


def _digit_bits(boards: np.ndarray, shape: BoardShape) -> np.ndarray:
    """(..., cells) int16: bit d - 1 for a digit d of the board, no bit for anything else."""
    digits = boards.astype(np.int16)
    return np.where((digits >= 1) & (digits <= shape.size), 1 << np.clip(digits - 1, 0, 8), 0).astype(np.int16)


@cache
def _digit_of_code(size: int) -> np.ndarray:
    """(128,) int8: ASCII code -> digit, 0 for a blank, -1 for the rest."""
    table = np.full(128, -1, np.int8)
    table[ord("1") : ord("1") + size] = np.arange(1, size + 1)
    table[[ord(blank) for blank in BLANKS]] = 0
    return table
