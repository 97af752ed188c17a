"""`relay-hf card`."""

from collections.abc import Sequence

from ..evaluation.code import add_to_card
from .parser import make_parser, parse


def run(program: str, argv: Sequence[str]) -> None:
    """Writes evaluations into a model's card: table, picture and metadata. What people wrote into the card stays."""
    parser = make_parser(program, "FOLDER RUN [OTHER ...]", [], run)
    parser.add_argument("folder", metavar="FOLDER", help="the model, as `relay-hf train` or `save_pretrained` wrote it")
    parser.add_argument("run", metavar="RUN", help="output folder of `relay-hf eval` on this model")
    parser.add_argument("others", metavar="OTHER", nargs="*", help="those of models that it is compared with")
    (arguments,) = parse(parser, argv)
    print(add_to_card(arguments.folder, [arguments.run, *arguments.others]))
