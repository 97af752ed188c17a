"""Load puzzles from a CSV file or the Hub, check them, and turn them into model inputs."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, load_dataset
from transformers import PreTrainedTokenizerBase

from .board import BoardShape, has_conflict, is_legal, parse_boards, read_boards, write_boards
from .solver import count_solutions

_COLUMNS = ("question", "answer")
_STRINGS = Features({column: Value("string") for column in _COLUMNS})
_IGNORED = -100  # label that the loss skips


def load_sudoku(
    source: str | Path,
    split: str = "train",
    limit: int | None = None,
    size: int | None = None,
    check_unique: bool = False,
) -> Dataset:
    """Load puzzles and check every row.

    Args:
        source: a CSV file with the columns `question` and `answer`, or the id of a Hub dataset that has them. Other
            columns are dropped.
        split: split of the Hub dataset; ignored for a CSV file, which is one split.
        limit: take only the first rows.
        size: size of the expected boards (4, 6 or 9); by default the size of the first question.
        check_unique: also solve every puzzle, to see that the answer is the only one (slow for 9x9).

    Returns: a dataset with the strings `question`, its blanks all written ".", and `answer`.
    Raises: ValueError if a column is missing or nothing is left, or naming a row (from 0) whose question or answer has
        a wrong length or character, whose clues conflict, whose answer is no legal board or does not keep the clues,
        or which has several solutions.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit={limit}` leaves no puzzles: use 1 or more, or None for all.")
    dataset = _read(source, split)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    shape = BoardShape.of_size(size) if size is not None else _shape_of_first_row(dataset)
    return dataset.map(
        _checked,
        batched=True,
        batch_size=10_000,
        with_indices=True,
        fn_kwargs={"size": shape.size, "check_unique": check_unique},
        features=_STRINGS,
        desc="Checking puzzles",
    )


def to_features(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """What a masked diffusion trainer needs: clues are given, blanks are to be learned.

    Args: dataset: has the columns `question` and `answer`. tokenizer: of boards of that size.
    Returns: a dataset with `input_ids`, the answer, and `labels`, the same at blanks and -100 at clues; a row has
        one id per cell.
    Raises: ValueError for no rows, for texts that are not boards of one size (answers without blanks), or if the
        tokenizer lacks one of their digits.
    """
    if len(dataset) == 0:
        raise ValueError("The dataset has no puzzles: give at least one row.")
    shape = BoardShape.of_cells(len(dataset[0]["question"]))
    return dataset.map(
        _encoded,
        batched=True,
        batch_size=10_000,
        fn_kwargs={"token_ids": _token_ids(tokenizer, shape)},
        remove_columns=dataset.column_names,
        features=Features({name: List(Value("int32")) for name in ("input_ids", "labels")}),
        desc="Encoding puzzles",
    )


def questions_to_ids(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Puzzles as a model decodes them: the clues' ids, and the mask id at every blank ("." or "0").

    Returns: (N, cells) int64.
    Raises: ValueError for texts that are not boards of one size, or if the tokenizer lacks one of their digits.
    """
    boards = parse_boards(questions)
    return torch.from_numpy(_token_ids(tokenizer, BoardShape.of_cells(boards.shape[-1]))[boards])


def _read(source: str | Path, split: str) -> Dataset:
    """The two text columns of a CSV file or Hub dataset, unchecked."""
    if Path(source).suffix != ".csv":
        dataset = load_dataset(str(source), split=split)
        _require_columns(dataset.column_names, source)
        return dataset.select_columns(list(_COLUMNS))
    if not Path(source).is_file():
        raise ValueError(f"There is no file {str(source)!r}: give the path of a CSV file, or the id of a Hub dataset.")
    with open(source, newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file)
        _require_columns(next(lines, []), source)
        if next(lines, None) is None:
            raise ValueError(f"{str(source)!r} has no puzzles below its header: choose another file.")
    # Without the features, boards of digits alone would be read as numbers and lose their leading zeros.
    return load_dataset("csv", data_files=str(source), usecols=list(_COLUMNS), features=_STRINGS)["train"]


def _require_columns(names: list[str], source: str | Path) -> None:
    """Raises: ValueError if `question` or `answer` is missing."""
    for column in _COLUMNS:
        if column not in names:
            raise ValueError(
                f"{str(source)!r} has no column {column!r} (it has {names}): rename its columns to question and answer."
            )


def _shape_of_first_row(dataset: Dataset) -> BoardShape:
    """Raises: ValueError, naming the row, if its question is not square."""
    try:
        return BoardShape.of_cells(len(dataset[0]["question"] or ""))
    except ValueError as error:
        raise ValueError(f"Row 0 is no Sudoku: {error}") from None


def _checked(batch: dict[str, list], rows: list[int], size: int, check_unique: bool) -> dict[str, list[str]]:
    """One batch of puzzles with uniform blanks, after all checks. `rows` are the row numbers for the messages."""
    questions = _checked_texts(batch["question"], rows, "question", size)
    answers = _checked_texts(batch["answer"], rows, "answer", size)
    _refuse(has_conflict(questions), rows, "question must not have a digit twice in a row, column or box")
    _refuse(~is_legal(answers), rows, "answer must have each digit once in every row, column and box")
    _refuse((questions > 0) & (questions != answers), rows, "answer must keep the clues of the question")
    texts = write_boards(questions)
    if check_unique:
        several = np.array([count_solutions(text) > 1 for text in texts])
        _refuse(several, rows, "question must have one solution, but it has more")
    return {"question": texts, "answer": write_boards(answers)}


def _checked_texts(texts: list[str | None], rows: list[int], column: str, size: int) -> np.ndarray:
    """One column as (n, cells) boards, after the checks of length and characters."""
    cells = size * size
    known = [text or "" for text in texts]
    wrong_length = np.array([len(text) != cells for text in known])
    _refuse(wrong_length, rows, f"{column} must have {cells} characters for a {size}x{size} board")
    boards = read_boards(known, BoardShape.of_size(size))
    lowest, blanks = (0, ', and "." or "0" for a blank') if column == "question" else (1, "")
    _refuse(boards < lowest, rows, f"{column} may only have the digits 1 to {size}{blanks}")
    return boards


def _refuse(bad: np.ndarray, rows: list[int], rule: str) -> None:
    """Raises: ValueError that names the first row marked in `bad`, (n,) or (n, cells) bool, and the rule it breaks."""
    if bad.any():
        first = int(np.argwhere(bad)[0, 0])
        raise ValueError(f"Row {rows[first]} (counting from 0) is no Sudoku: its {rule}; correct or remove the row.")


def _encoded(batch: dict[str, list[str]], token_ids: np.ndarray) -> dict[str, np.ndarray]:
    """`input_ids` and `labels`, each (n, cells), of one batch."""
    questions = parse_boards(batch["question"])
    answers = parse_boards(batch["answer"], BoardShape.of_cells(questions.shape[-1]), solved=True)
    input_ids = token_ids[answers].astype(np.int32)
    return {"input_ids": input_ids, "labels": np.where(questions == 0, input_ids, _IGNORED).astype(np.int32)}


def _token_ids(tokenizer: PreTrainedTokenizerBase, shape: BoardShape) -> np.ndarray:
    """(S + 1,) int64: the mask id for a blank, then the id of every digit.

    Raises: ValueError if the tokenizer has no mask token or lacks a digit.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("The tokenizer has no mask token for the blanks: use `make_sudoku_tokenizer`.")
    vocabulary = tokenizer.get_vocab()
    for digit in range(1, shape.size + 1):
        if str(digit) not in vocabulary:
            raise ValueError(
                f"The tokenizer lacks the digit {digit} of a {shape.size}x{shape.size} board: "
                f"use `make_sudoku_tokenizer({shape.size})`."
            )
    return np.array([tokenizer.mask_token_id, *(vocabulary[str(digit)] for digit in range(1, shape.size + 1))])
