"""`relay-hf serve`."""

from collections.abc import Sequence

from ..serving import ServeArguments, run_server
from .parser import make_parser, parse


def run(program: str, argv: Sequence[str]) -> None:
    """Answers requests of OpenAI clients with a relay model."""
    parser = make_parser(program, "PATH_OR_REPO", ServeArguments, run.__doc__)
    parser.add_argument("model", metavar="PATH_OR_REPO", help="the model: a folder, or a repository of the Hub")
    arguments, where = parse(parser, argv)
    run_server(where.model, arguments)
