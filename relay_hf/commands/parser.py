"""The parser that commands share.

It is that of TRL: transformers' `HfArgumentParser` as well, but `--help` and refused options do not wait for
transformers and torch.
"""

import argparse
import copy
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trl import TrlParser

# Type of a value -> its placeholder in the help.
METAVARS = {"int": "N", "float": "X", "str": "TEXT", "string_to_bool": "BOOL"}
# The positional argument of commands that read a model.
MODEL = {"PATH_OR_REPO": "the model: a folder, or a repository of the Hub"}


class _Parser(TrlParser):
    """Shows a default in the help unless it is empty; None usually means "as the model has it"."""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        if "type" in options and "choices" not in options and names[0].startswith("-"):
            options.setdefault("metavar", METAVARS.get(options["type"].__name__))
        if options.get("default") not in (None, False, "", [], argparse.SUPPRESS):
            options["help"] += " [%(default)s]"
        return super().add_argument(*names, **options)


class _HelpFormatter(argparse.HelpFormatter):
    """Shows options in one spelling; `--block-size` is understood as well as `--block_size`."""

    def _format_action_invocation(self, action: argparse.Action) -> str:  # argparse has no public way
        shown = copy.copy(action)
        spellings = {name.lstrip("-").replace("-", "_"): name for name in reversed(action.option_strings)}
        shown.option_strings = [*reversed(spellings.values())]
        return super()._format_action_invocation(shown)


def make_parser(program: str, positionals: Mapping[str, str], arguments: Any, description: str | None) -> TrlParser:
    """A parser for the fields of dataclasses.

    Args:
        program: the command, as the user typed it.
        positionals: positional arguments as the usage shows them, `[OTHER ...]` for instance -> what each is.
        arguments: the dataclass, or several.
        description: a sentence about the command.
    """
    usage = " ".join([program, *positionals, *(["[--OPTION VALUE ...]"] if arguments else [])])
    parser = _Parser(arguments, prog=program, usage=usage, description=description, formatter_class=_HelpFormatter)
    for shown, purpose in positionals.items():
        name = shown.strip("[ .]")
        count = {"nargs": "*" if "..." in shown else "?"} if "[" in shown else {}
        parser.add_argument(name.lower(), metavar=name, help=purpose, **count)
    return parser


def parse(parser: TrlParser, argv: Sequence[str]) -> tuple[Any, ...]:
    """The dataclasses, and a namespace of the arguments that were added to the parser.

    Raises:
        ValueError: an option is unknown.
    """
    # Before the dataclasses are made, which refuse values.
    if rest := parser.parse_known_args(argv)[1]:
        raise ValueError(unknown_option(parser, rest[0]))
    return parser.parse_args_into_dataclasses(argv)


def unknown_option(parser: argparse.ArgumentParser, given: str, listing: str = "--help") -> str:
    """The sentence about an unknown option, with the known option that is most like it.

    Args:
        parser: the parser that does not know it.
        given: an option, or a text that is no value of one.
        listing: the option that lists all options.
    """
    # argparse has no public list of its options.
    known: Iterable[str] = (action.dest for action in parser._actions if action.option_strings)
    name = given.lstrip("-").split("=")[0].replace("-", "_")
    alike = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean `{alike[0]}`?" if alike else f"`{parser.prog} {listing}` lists the options."
    return f"`{given}` is not an option of `{parser.prog}`: {hint}"
