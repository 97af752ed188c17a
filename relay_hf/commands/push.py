"""`relay-hf push`."""

from collections.abc import Sequence
from dataclasses import asdict

from ..hub import PushArguments, push
from .parser import make_parser, parse


def run(program: str, argv: Sequence[str]) -> None:
    """Uploads a relay model, or an adapter of one, to the Hub in one commit."""
    parser = make_parser(program, "FOLDER REPO_ID", PushArguments, run.__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="what `save_pretrained` or a trainer wrote")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name; made if it does not exist")
    arguments, where = parse(parser, argv)
    print(push(where.folder, where.repo_id, **asdict(arguments)).commit_url)
