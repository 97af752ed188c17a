"""What is asked of the model, row by row of a data set, and which of its replies are right."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..evaluation.code.chat_prompt import ChatPrompt
from ..evaluation.code.evaluate import check_solutions
from ..evaluation.code.extraction import extract_code
from ..evaluation.code.problems import read_problem
from ..evaluation.code.sandbox import Limits, check_platform
from ..loading.tokenizer import encode_prompt
from ..modeling import RelayConfig
from ..tasks.sudoku import BoardShape, is_legal, questions_to_ids
from ..tasks.sudoku.board import read_boards
from .decoding import NO_LABEL, Trace

Row = dict[str, Any]
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Task:
    """Replies to prompts, all of which are kept.

    Args:
        tokenizer: that of the model.
        config: the model's configuration.
        prompt_column: column of prompts.
        answer_column: column of what is right, for tasks that compare.
        raw: give prompts without the chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: RelayConfig,
        prompt_column: str = "prompt",
        answer_column: str = "answer",
        raw: bool = False,
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.config = config
        self.prompt_column = prompt_column
        self.answer_column = answer_column
        self.raw = raw

    def prompt(self, row: Row) -> list[int]:
        """The ids of a row's prompt.

        `input_ids` with `labels` end where the first label is; in a canvas, [MASK] is wherever a label is. A text, or
        the messages before the last reply, are tokenised.

        Raises:
            ValueError: the row has no prompt.
        """
        if "input_ids" in row and "labels" in row:
            return self._of_tokens(row["input_ids"], row["labels"])
        given = row.get(self.prompt_column) or row.get("messages")
        if isinstance(given, str):
            return encode_prompt(self.tokenizer, given, self.raw)["input_ids"][0].tolist()
        if not given:
            raise ValueError(
                f"There is no text, and no message, in `{self.prompt_column}`: name the column of prompts in "
                "`--prompt_column`."
            )
        asked = given[:-1] if given[-1].get("role") == "assistant" else given
        return self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]

    def _of_tokens(self, ids: Sequence[int], labels: Sequence[int]) -> list[int]:
        is_learned = [label != NO_LABEL for label in labels]
        if self.config.block_size is None:
            return [self.config.mask_token_id if learned else i for i, learned in zip(ids, is_learned, strict=True)]
        return list(ids[: is_learned.index(True) if True in is_learned else len(ids)])

    def are_right(self, rows: Sequence[Row], traces: Sequence[Trace]) -> list[bool]:
        """Whether each row's reply is right."""
        texts = [self.tokenizer.decode(trace.written, skip_special_tokens=True) for trace in traces]
        return [self.is_right(row, text) for row, text in zip(rows, texts, strict=True)]

    def is_right(self, row: Row, text: str) -> bool:
        """Whether the text of one reply is right."""
        return True


class Answers(Task):
    """Replies whose last number is that of the answer; an answer without a number must be equal, spaces aside."""

    def prompt(self, row: Row) -> list[int]:
        self._answer(row)  # raises before work starts
        return super().prompt(row)

    def is_right(self, row: Row, text: str) -> bool:
        expected = self._answer(row)
        wanted, found = (NUMBER.findall(each) for each in (expected, text))
        if not wanted:
            return expected.split() == text.split()
        return bool(found) and _value(found[-1]) == _value(wanted[-1])

    def _answer(self, row: Row) -> str:
        for given in (row.get(self.answer_column), row.get("completion"), row.get("messages")):
            text = given[-1].get("content") if isinstance(given, list) and given else given
            if text is not None:
                return str(text)
        raise ValueError(f"There is no answer in `{self.answer_column}`: name its column in `--answer_column`.")


class Programs(Task):
    """Programs that pass the tests of a row in the format of HumanEval or MBPP, asked as `relay-hf eval` asks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        check_platform()
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "The tokenizer has no chat template to ask with: set `tokenizer.chat_template` and save it."
            )

    def prompt(self, row: Row) -> list[int]:
        text = ChatPrompt().text(read_problem(row, "The row").question, self.tokenizer)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def are_right(self, rows: Sequence[Row], traces: Sequence[Trace]) -> list[bool]:
        problems = [read_problem(row, "The row") for row in rows]
        texts = [self.tokenizer.decode(trace.written, skip_special_tokens=True) for trace in traces]
        solutions = [
            extract_code(text, problem.entry_point, problem.given)
            for text, problem in zip(texts, problems, strict=True)
        ]
        return [outcome.passed for outcome in check_solutions(problems, solutions, Limits())]


class Boards(Task):
    """Sudoku boards that are filled in by the rules; the column `question` has the puzzles."""

    def prompt(self, row: Row) -> list[int]:
        return questions_to_ids([row.get("question") or ""], self.tokenizer)[0].tolist()

    def are_right(self, rows: Sequence[Row], traces: Sequence[Trace]) -> list[bool]:
        boards = [self.tokenizer.decode(trace.input_ids) for trace in traces]
        return is_legal(read_boards(boards, BoardShape.of_cells(len(boards[0])))).tolist()


# Value of `--check` -> task.
TASKS: dict[str, type[Task]] = {"none": Task, "answer": Answers, "tests": Programs, "sudoku": Boards}


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", "").rstrip("."))
