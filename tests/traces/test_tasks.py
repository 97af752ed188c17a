"""Which prompts are made of rows, and which replies are right."""

from typing import Any

import pytest

from relay_hf.modeling import RelayConfig
from relay_hf.tasks.sudoku import make_sudoku_tokenizer
from relay_hf.testing import CHAT_TEMPLATE, byte_tokenizer, tiny_text_config
from relay_hf.traces import TASKS, Task, Trace

TOKENIZER = byte_tokenizer(chat_template=CHAT_TEMPLATE)


def task(check: str = "none", block_size: int | None = 8, **options: Any) -> Task:
    config = RelayConfig(text_config=tiny_text_config(), block_size=block_size, mask_token_id=63)
    return TASKS[check](options.pop("tokenizer", TOKENIZER), config, **options)


def reply(text: str, tokenizer: Any = TOKENIZER) -> Trace:
    ids = tokenizer(text)["input_ids"]
    return Trace(ids, ids, [1] * len(ids), {})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi"},
        {"prompt": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    ],
)
def test_prompt_of_text_or_messages_asks_for_a_reply(row: dict[str, Any]) -> None:
    assert TOKENIZER.decode(task().prompt(row)) == "user: hi\nassistant: "
    assert TOKENIZER.decode(task(raw=True).prompt({"prompt": "hi"})) == "hi"


def test_prompt_of_tokens_ends_at_the_first_label_or_masks_a_canvas() -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, -100]}
    assert task().prompt(row) == [5, 6]
    assert task(block_size=None).prompt(row) == [5, 6, 63, 8]


@pytest.mark.parametrize(
    ("answer", "text", "is_right"),
    [
        ("#### 1,200", "so it is 1200.", True),
        ("2.50", "x = 2.5", True),
        ("-3", "it is 3", False),
        ("7", "no idea", False),
        ("blue sky", " blue  sky\n", True),
        ("blue", "a blue sky", False),
    ],
)
def test_answer_is_the_last_number_or_the_text(answer: str, text: str, is_right: bool) -> None:
    rows = [
        {"prompt": "?", "answer": answer},
        {"prompt": "?", "completion": [{"role": "assistant", "content": answer}]},
    ]
    assert task("answer").are_right(rows, [reply(text)] * 2) == [is_right] * 2


def test_answer_missing_raises_before_anything_is_asked() -> None:
    with pytest.raises(ValueError, match="There is no answer in `answer`: name its column in `--answer_column`"):
        task("answer").prompt({"prompt": "hi"})


def test_programs_are_right_if_their_tests_pass() -> None:
    row = {"task_id": "a/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1"}
    programs = task("tests")
    assert TOKENIZER.decode(programs.prompt(row)).endswith("```python\n")
    replies = [reply("def f():\n    return 1\n```"), reply("def f():\n    return 2\n```")]
    assert programs.are_right([row] * 2, replies) == [True, False]


def test_boards_are_right_if_the_rules_hold() -> None:
    tokenizer = make_sudoku_tokenizer(4)
    boards = task("sudoku", block_size=None, tokenizer=tokenizer)
    row = {"question": "1234" + "." * 12}
    assert boards.prompt(row).count(tokenizer.mask_token_id) == 12
    replies = [reply(text, tokenizer) for text in ("1234341221434321", "1234341221434312")]
    assert boards.are_right([row] * 2, replies) == [True, False]
