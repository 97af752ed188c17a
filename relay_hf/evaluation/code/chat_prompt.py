"""The words of an evaluation's chat."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ChatPrompt:
    """What the chat says around a problem; published numbers depend on the words.

    Args:
        instruction: the user's words in front of the problem.
        answer_start: the assistant's words in front of the code block that the model is to write.
    """

    instruction: str = "Solve this problem with one complete Python program, in a single Markdown code block:"
    answer_start: str = "This program defines the function that was asked for:"

    def text(self, question: str, tokenizer: Any) -> str:
        """The chat up to the opening of the code block that the model is to write.

        Args:
            question: Python text with the task in a docstring.
            tokenizer: has a chat template.
        """
        chat = [
            {"role": "user", "content": f"{self.instruction}\n```\n{question.strip()}\n```\n"},
            {"role": "assistant", "content": f"{self.answer_start}\n```python\n"},
        ]
        return tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
