"""Small puzzles, and a slow solver that shares no code with the package, to judge it by."""

from collections.abc import Callable, Iterator

import pytest
from datasets import Dataset

from relay_hf.tasks.sudoku import generate_puzzles

BOXES = {16: (2, 2), 36: (2, 3), 81: (3, 3)}  # characters -> rows and columns of a box
QUESTION = "12.434..2..3...1"
ANSWER = "1234341221434321"


def solutions_of(text: str) -> Iterator[str]:
    """Every solution of a puzzle, trying each digit in the first blank against the rules as one would on paper."""
    size, (height, width) = int(len(text) ** 0.5), BOXES[len(text)]
    if "." not in text:
        yield text
        return
    cell = text.index(".")
    row, column = divmod(cell, size)
    seen = {
        text[other]
        for other in range(size * size)
        if other // size == row
        or other % size == column
        or (other // size // height == row // height and other % size // width == column // width)
    }
    for digit in "123456789"[:size]:
        if digit not in seen:
            yield from solutions_of(text[:cell] + digit + text[cell + 1 :])


@pytest.fixture(scope="session")
def oracle() -> Callable[[str], Iterator[str]]:
    """The independent solver."""
    return solutions_of


@pytest.fixture(scope="session")
def puzzles4() -> Dataset:
    """200 minimal 4x4 puzzles."""
    return generate_puzzles(200, size=4, seed=1, progress=False)


@pytest.fixture(scope="session")
def puzzles6() -> Dataset:
    """60 minimal 6x6 puzzles."""
    return generate_puzzles(60, size=6, seed=2, progress=False)


@pytest.fixture
def tiny() -> tuple[str, str]:
    """One 4x4 question and its answer."""
    return QUESTION, ANSWER
