"""Checks of rows of text or messages; an error is one sentence with row and column."""

import re
from dataclasses import dataclass
from typing import Any

# Other roles are a matter of the chat template.
ROLES = {"system", "developer", "user", "assistant", "tool", "function"}
# TRL renames these keys, and no role.
KEYS = {"conversations": ("from", "value")}


@dataclass(frozen=True)
class TextRows:
    """What the rows of one data set must look like; the first row says it of all.

    Args:
        name: what messages call the data set.
        columns: those that are read.
        is_talk: whether they hold messages, and not texts.
        quoted: the words between quotes in the chat template, its own roles among them.
        needs_reply: whether only the assistant's messages are learned.
    """

    name: str
    columns: tuple[str, ...]
    is_talk: bool
    quoted: frozenset[str]
    needs_reply: bool

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """The row; its messages are copies.

        Raises:
            ValueError: a column holds no text, or no messages that a chat template can show.
        """
        for column in self.columns:
            where = f"Row {index} of the {self.name} has"
            if self.is_talk:
                self._check_messages(row.get(column), where, column)
            elif not isinstance(row.get(column), str):
                raise ValueError(
                    f"{where} {shown(row.get(column))} in the column `{column}`, which must hold text: give a text, "
                    "or remove the row."
                )
        if self.needs_reply and not any("assistant" in m.values() for column in self.columns for m in row[column]):
            raise ValueError(
                f"Row {index} of the {self.name} has no message of the assistant in `{self.columns[-1]}`, but "
                "`assistant_only_loss=True` learns nothing else: remove the row."
            )
        if not isinstance(row.get("chat_template_kwargs", {}), dict):
            raise ValueError(
                f"Row {index} of the {self.name} has {shown(row['chat_template_kwargs'])} in the column "
                "`chat_template_kwargs`, which must hold names and values: give `{}` for none."
            )
        if not self.is_talk:
            return row
        # TRL renames keys in place, which a stream out of memory would show in its next epoch.
        return {**row, **{column: [dict(message) for message in row[column]] for column in self.columns}}

    def _check_messages(self, messages: Any, where: str, column: str) -> None:
        if not isinstance(messages, list) or not messages:
            raise ValueError(
                f"{where} {shown(messages)} in the column `{column}`, which must hold messages: give a list of "
                "`role` and `content`, or remove the row."
            )
        for number, message in enumerate(messages):
            if problem := self._problem(message, *KEYS.get(column, ("role", "content"))):
                raise ValueError(f"{where} in message {number} of the column `{column}` {problem}.")

    def _problem(self, message: Any, role_key: str, content_key: str) -> str:
        """What is wrong with a message, and what to do; empty if nothing is."""
        if not isinstance(message, dict) or not {role_key, content_key} <= message.keys() | {"content"}:
            return f"{shown(message)}: give `{role_key}` and `{content_key}`"
        role, content = message[role_key], message.get(content_key)
        if not isinstance(role, str) or role not in ROLES | self.quoted:
            return f"the role {shown(role)}: give one of {sorted(ROLES)}, or one that the chat template names"
        if isinstance(content, list):
            return "a list of parts, such as images, as content: give one text, the model reads nothing else"
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            return f"{shown(content)} as content: give a text, or remove the row"
        return ""


def text_rows(row: dict[str, Any], name: str, text_field: str, template: str | None, needs_reply: bool) -> TextRows:
    """What rows must look like to be like the first one.

    Args:
        row: the first one.
        name: what messages call the data set.
        text_field: the column of plain text.
        template: the chat template, if there is one.
        needs_reply: whether only the assistant's messages are learned.

    Raises:
        ValueError: it does not say what to learn, or says it twice.
    """
    kinds = [("prompt", "completion"), ("messages",), ("conversations",), (text_field,)]
    found = [kind for kind in kinds if set(kind) <= row.keys()]
    if not found:
        raise ValueError(
            f"The {name} has the columns {sorted(row)}, none of which says what to learn: give `prompt` and "
            f"`completion`, `messages`, `{text_field}` (named by `dataset_text_field`), or `input_ids` and `labels`."
        )
    if len(found) > 1:
        raise ValueError(
            f"The {name} has the columns {[column for kind in found for column in kind]}, each of which could be "
            "learned: remove those that are not to be."
        )
    (columns,) = found
    is_talk = columns in kinds[1:3] or (columns in kinds[:1] and isinstance(row["prompt"], list))
    quoted = frozenset(re.findall(r"['\"](\w+)['\"]", template or ""))
    return TextRows(name, columns, is_talk, quoted, needs_reply and is_talk)


def shown(value: Any) -> str:
    """A value of a row as messages show it, cut off."""
    text = repr(value)
    return f"`{text if len(text) <= 60 else text[:57] + '...'}`"
