"""`relay-hf serve`."""

from collections.abc import Sequence

from ..serving import ServeArguments, run_server
from .parser import MODEL, make_parser, parse


def run(program: str, argv: Sequence[str]) -> None:
    """Answers requests of OpenAI clients with a relay model."""
    arguments, where = parse(make_parser(program, MODEL, ServeArguments, run.__doc__), argv)
    run_server(where.path_or_repo, arguments)
