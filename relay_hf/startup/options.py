"""Fields of the dataclasses that the commands read their options into, and the check that most of them need."""

from dataclasses import field
from typing import Any


def option(default: Any, purpose: str, metavar: str | None = None) -> Any:
    """A field of a dataclass with a sentence for `--help`.

    Args:
        default: its value, or a function that makes it.
        purpose: the sentence.
        metavar: what stands for the value in the help; None = the sign of its type.
    """
    metadata = {"help": purpose} | ({"metavar": metavar} if metavar else {})
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def require_at_least(least: int, arguments: Any, *names: str) -> None:
    """Checks options that may also be None.

    Raises:
        ValueError: a number is smaller than `least`.
    """
    for name in names:
        if (value := getattr(arguments, name)) is not None and value < least:
            raise ValueError(f"`--{name}={value}` must be at least {least}.")
