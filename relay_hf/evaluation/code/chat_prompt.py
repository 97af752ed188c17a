"""The words of an evaluation's chat."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChatPrompt:
    """What the chat says around a problem; published numbers depend on the words.

    Args:
        instruction: the user's words in front of the problem.
        answer_start: the assistant's words in front of the code block that the model is to write.
    """

    instruction: str = "Solve this problem with one complete Python program, in a single Markdown code block:"
    answer_start: str = "This program defines the function that was asked for:"
