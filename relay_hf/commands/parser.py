"""The parser that commands share."""

import argparse
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers import HfArgumentParser


def make_parser(program: str, arguments: Any, run: Callable[..., None]) -> HfArgumentParser:
    """A parser for the fields of a dataclass.

    Args:
        program: what the user typed.
        arguments: the dataclass.
        run: the command, whose docstring tells what it does.
    """
    return HfArgumentParser(arguments, prog=program, description=run.__doc__)


def parse(parser: HfArgumentParser, argv: Sequence[str]) -> tuple[Any, ...]:
    """The dataclasses, and what was added to the parser.

    Raises:
        ValueError: something is not understood.
    """
    *parsed, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if rest:
        raise ValueError(unknown_option(parser, rest[0]))
    return tuple(parsed)


def unknown_option(parser: argparse.ArgumentParser, given: str, listing: str = "--help") -> str:
    """The sentence about something that is not understood, with the option that is most like it.

    Args:
        parser: what did not understand it.
        given: an option, or a text that stands for itself.
        listing: the option that lists what there is.
    """
    # argparse has no public list of its options.
    known: Iterable[str] = (action.dest for action in parser._actions if action.option_strings)
    name = given.lstrip("-").split("=")[0].replace("-", "_")
    alike = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean `{alike[0]}`?" if alike else f"`{parser.prog} {listing}` lists what there is."
    return f"`{given}` is not an option of `{parser.prog}`: {hint}"
