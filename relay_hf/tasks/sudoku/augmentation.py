"""More puzzles from few: random symmetries of the board, applied to question and answer alike."""

import numpy as np
from datasets import Dataset

from .board import BoardShape, parse_boards, write_boards

_CHUNK = 65_536  # rows worked on at once, to bound memory


def augment_puzzles(dataset: Dataset, rows: int, seed: int = 0) -> Dataset:
    """Go round the puzzles in shuffled order until there are `rows` rows, each time with a fresh random symmetry.

    The rows are twins of the given puzzles, so augment a training set only after the test set has been split off
    (`split_puzzles`).

    Args: dataset: has the columns `question` and `answer`. rows: rows to make. seed: seed of order and symmetries.
    Returns: a dataset with the columns `question` and `answer`.
    Raises: ValueError if the dataset is empty, or for texts that are not boards of one size.
    """
    if rows < 1:
        raise ValueError(f"`rows={rows}` asks for no puzzles: use 1 or more.")
    questions = parse_boards(dataset["question"][:])  # (N, cells)
    answers = parse_boards(dataset["answer"][:], BoardShape.of_cells(questions.shape[-1]), solved=True)
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(len(questions)) for _ in range(-(-rows // len(questions)))]
    order = np.concatenate(rounds)[:rows]
    texts: dict[str, list[str]] = {"question": [], "answer": []}
    for start in range(0, rows, _CHUNK):
        chosen = order[start : start + _CHUNK]
        pairs = np.stack([questions[chosen], answers[chosen]], axis=1)  # (n, 2, cells)
        twins = random_symmetry(pairs, rng)
        texts["question"] += write_boards(twins[:, 0])
        texts["answer"] += write_boards(twins[:, 1])
    return Dataset.from_dict(texts)


def random_symmetry(boards: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply one random Sudoku symmetry to each group of boards.

    A symmetry relabels the digits, permutes the rows inside each band, the bands, the columns inside each stack and the
    stacks, and, if boxes are square, transposes half of the time. All of them are equally likely.

    Args: boards: (N, K, cells) digits, 0 for a blank; the K boards of a group get the same symmetry.
    Returns: (N, K, cells), dtype of boards.
    """
    count = len(boards)
    shape = BoardShape.of_cells(boards.shape[-1])
    rows = _random_lines(count, shape.size, shape.box_height, rng)
    columns = _random_lines(count, shape.size, shape.box_width, rng)
    sources = rows[:, :, None] * shape.size + columns[:, None, :]  # (N, S, S): the cell that each cell is taken from
    if shape.square_boxes:
        transposed = rng.random(count) < 0.5
        sources = np.where(transposed[:, None, None], sources.swapaxes(1, 2), sources)
    moved = np.take_along_axis(boards, sources.reshape(count, 1, shape.cells), axis=2)

    labels = np.zeros((count, shape.size + 1), boards.dtype)  # the new name of each digit; a blank stays 0
    labels[:, 1:] = 1 + rng.random((count, shape.size)).argsort(axis=1)
    return np.take_along_axis(labels[:, None, :], moved.astype(np.intp), axis=2)


def _random_lines(count: int, size: int, thickness: int, rng: np.random.Generator) -> np.ndarray:
    """(count, size) random orders of the rows (or columns) that keep each band (or stack) of `thickness` together."""
    bands = rng.random((count, size // thickness, 1)).argsort(axis=1)
    inside = rng.random((count, size // thickness, thickness)).argsort(axis=2)
    return (bands * thickness + inside).reshape(count, size)
