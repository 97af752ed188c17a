"""Every row of a data set is read as it was given: columns with a meaning count or are refused, with row and column."""

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from relay_hf.trainers import RelayTrainer

from .text import build_text_model, build_tokenizer

TEXT = {"prompt": "a", "completion": "b"}
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TOKENS = [65, 66, 67, 68]


@pytest.fixture
def read(make_trainer: Callable[..., RelayTrainer]) -> Callable[..., list[dict[str, Any]]]:
    """The rows that a trainer learns from."""

    def read(data: Any, trainer_options: dict | None = None, **changes: Any) -> list[dict[str, Any]]:
        options = {"processing_class": build_tokenizer(), **(trainer_options or {})}
        return [*make_trainer(build_text_model(), data, options, **changes).train_dataset]

    return read


def as_sets(rows: list[dict[str, Any]]) -> tuple[Dataset, IterableDataset]:
    """A data set in memory, and a stream that knows its columns no better than its rows do."""
    return Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows))


def talk(**changes: Any) -> dict[str, Any]:
    return {"messages": [TALK[0], {**TALK[1], **changes}]}


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (TEXT, {**TEXT, "completion": None}, "`None` in the column `completion`, which must hold text"),
        (TEXT, {**TEXT, "prompt": None}, "`None` in the column `prompt`, which must hold text"),
        ({"text": "a"}, {"text": None}, "`None` in the column `text`"),
        ({"messages": TALK}, {"messages": None}, "`None` in the column `messages`, which must hold messages"),
        ({"messages": TALK}, {"messages": []}, r"`\[\]` in the column `messages`"),
        ({"messages": TALK}, talk(content=None), "in message 1 of the column `messages` `None` as content"),
        ({"messages": TALK}, talk(role="asistant"), "message 1 .* the role `'asistant'`: give one of"),
        ({"messages": TALK}, talk(role=None), "the role `None`"),
        (
            {"prompt": TALK[:1], "completion": TALK[1:]},
            {"prompt": TALK[:1], "completion": []},
            r"`\[\]` in the column `completion`",
        ),
        (
            {"conversations": [{"from": "user", "value": "a"}]},
            {"conversations": [{"from": "user", "value": None}]},
            "in message 0 of the column `conversations` `None` as content",
        ),
        ({"input_ids": TOKENS}, {"input_ids": None}, "`None` in the column `input_ids`"),
        ({"input_ids": TOKENS}, {"input_ids": [65, None]}, r"`\[65, None\]` in the column `input_ids`"),
        (
            {"input_ids": TOKENS, "attention_mask": [1] * 4},
            {"input_ids": TOKENS, "attention_mask": [1, 0, 1, 1]},
            "zeros of `attention_mask` between tokens",
        ),
        (
            {"input_ids": TOKENS, "attention_mask": [1] * 4},
            {"input_ids": TOKENS, "attention_mask": [1, 1, 2, 2]},
            "a number in `attention_mask` that is neither 0 nor 1",
        ),
        (
            {"input_ids": TOKENS, "attention_mask": [1] * 4},
            {"input_ids": TOKENS, "attention_mask": [1]},
            "has 1 numbers in `attention_mask` for 4 `input_ids`",
        ),
        (
            {"input_ids": TOKENS, "position_ids": [0, 1, 2, 3]},
            {"input_ids": TOKENS, "position_ids": [0, 1, 0, 1]},
            "`position_ids` that do not count its tokens from 0",
        ),
        (
            {"input_ids": TOKENS, "seq_lengths": [4]},
            {"input_ids": TOKENS, "seq_lengths": [2, 2]},
            "holds 2 texts by its `seq_lengths`",
        ),
        (
            {"input_ids": TOKENS, "labels": TOKENS, "completion_mask": [1] * 4},
            {"input_ids": TOKENS, "labels": TOKENS, "completion_mask": [0, 1, 1, 1]},
            "labels where `completion_mask` is 0",
        ),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True], ids=["set", "stream"])
def test_bad_row_raises_with_its_number(
    read: Callable[..., list], good: dict, bad: dict, message: str, is_stream: bool
) -> None:
    with pytest.raises(ValueError, match=f"^Row 2 of the training set .*{message}"):
        read(as_sets([good, good, bad])[is_stream], max_length=None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3, "completion": 4}, "Row 0 .* has `3` in the column `prompt`, which must hold text"),
        ({"text": 1.5}, "Row 0 .* has `1.5` in the column `text`"),
        ({"input_ids": "[65, 66]"}, "Row 0 .* in the column `input_ids`, which must hold a list of whole numbers"),
        ({"input_ids": [0.5, 1.5]}, r"`\[0.5, 1.5\]` in the column `input_ids`"),
        ({"input_ids": [TOKENS]}, "in the column `input_ids`, which must hold a list of whole numbers"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "message 0 .* a list of parts, such as images, as content: give one text",
        ),
        ({"conversations": [{"from": "human", "value": "a"}]}, "the role `'human'`: give one of"),
        ({"conversations": TALK}, "give `from` and `value`"),
        ({"messages": ["a"]}, "message 0 of the column `messages` `'a'`: give `role` and `content`"),
        ({**TEXT, "text": "c"}, r"columns \['prompt', 'completion', 'text'\], each of which could be learned"),
        ({"input_ids": TOKENS, "pixel_values": [1.0]}, r"has the columns \['pixel_values'\], which the model does not"),
        ({"messages": TALK, "chat_template_kwargs": None}, "`None` in the column `chat_template_kwargs`"),
    ],
)
def test_first_row_that_cannot_be_read_raises(read: Callable[..., list], row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(Dataset.from_list([row]))


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "a"}, {"completion_only_loss": True}, "no effect on the training set without `prompt` and `complet"),
        ({"input_ids": TOKENS}, {"completion_only_loss": True}, "on the training set without `completion_mask`"),
        ({"messages": TALK[:1]}, {"assistant_only_loss": True}, "Row 0 .* no message of the assistant in `messages`"),
    ],
)
def test_option_that_the_rows_leave_without_effect_raises(
    read: Callable[..., list], row: dict, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(Dataset.from_list([row]), **options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([TEXT], "The training set is a list: give one `Dataset` or `IterableDataset`"),
        (DatasetDict(train=Dataset.from_list([TEXT])), r"is a DatasetDict with the splits \['train'\]: give one"),
    ],
    ids=["list", "DatasetDict"],
)
def test_no_data_set_raises(read: Callable[..., list], data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(data)


def test_evaluation_set_that_is_a_list_raises(read: Callable[..., list]) -> None:
    with pytest.raises(ValueError, match="The data set `eval` is a list: give one `Dataset`"):
        read(Dataset.from_list([TEXT]), {"eval_dataset": [TEXT]})


def test_chat_template_that_refuses_a_row_raises(read: Callable[..., list]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"template refuses a row of the training set \(roles must alternate\)"):
        read(Dataset.from_list([{"messages": TALK}]), {"processing_class": tokenizer})


@pytest.mark.parametrize("is_stream", [False, True], ids=["set", "stream"])
@pytest.mark.parametrize(
    ("columns", "ids", "labels"),
    [
        ({"attention_mask": [0, 1, 1, 1]}, [66, 67, 68], [66, 67, 68]),
        ({"attention_mask": [1, 1, 0, 0]}, [65, 66], [65, 66]),
        ({"attention_mask": [0, 1, 1, 0], "labels": [65, -100, 67, -100]}, [66, 67], [-100, 67]),
        ({"attention_mask": [0, 1, 1, 1], "position_ids": [1, 0, 1, 2]}, [66, 67, 68], [66, 67, 68]),
        ({"completion_mask": [0, 0, 1, 1]}, TOKENS, [-100, -100, 67, 68]),
        ({"assistant_masks": [0, 1, 0, 1]}, TOKENS, [-100, 66, -100, 68]),
        ({"completion_mask": [0, 0, 1, 1], "assistant_masks": [1, 1, 1, 0]}, TOKENS, [-100, -100, 67, -100]),
        ({"completion_mask": [0, 0, 1, 1], "labels": [-100, -100, -100, 68]}, TOKENS, [-100, -100, -100, 68]),
        ({"seq_lengths": [4]}, TOKENS, TOKENS),
    ],
)
def test_columns_of_tokens_count(
    read: Callable[..., list], columns: dict, ids: list[int], labels: list[int], is_stream: bool
) -> None:
    rows = read(as_sets([{"input_ids": TOKENS, **columns}] * 2)[is_stream])
    assert [(row["input_ids"], row["labels"]) for row in rows] == [(ids, labels)] * 2
    assert not set(columns) - {"labels"} & rows[0].keys()


def test_completion_mask_is_left_alone_where_prompts_are_to_be_learned(read: Callable[..., list]) -> None:
    data = Dataset.from_list([{"input_ids": TOKENS, "completion_mask": [0, 0, 1, 1]}])
    assert read(data, completion_only_loss=False)[0]["labels"] == TOKENS


def test_row_padded_beforehand_trains_as_the_row_without_padding(
    make_trainer: Callable[..., RelayTrainer],
) -> None:
    losses = []
    for row in ({"input_ids": TOKENS}, {"input_ids": [257, 257, *TOKENS], "attention_mask": [0, 0, 1, 1, 1, 1]}):
        data = Dataset.from_list([row] * 4)
        trainer = make_trainer(build_text_model(), data, {"processing_class": build_tokenizer()}, max_steps=2)
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "row",
    [
        talk(content=None, tool_calls=[{"name": "f"}]),
        {"messages": [TALK[0], {"role": "critic", "content": "b"}]},
        {"messages": TALK, "chat_template_kwargs": {"fast": True}},
        {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
        {**TEXT, "source": None, "score": 3},
    ],
    ids=["tool call", "role of the template", "template arguments", "ShareGPT", "columns of no meaning"],
)
def test_row_that_can_be_read_is_taken(read: Callable[..., list], row: dict) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ 'C' if m.role == 'critic' else m.content }}{% endfor %}"
    assert read(Dataset.from_list([row]), {"processing_class": tokenizer})[0]["labels"]
