"""`relay-hf card`."""

import argparse
from collections.abc import Sequence

from ..evaluation.code import add_to_card


def run(program: str, argv: Sequence[str]) -> None:
    """Writes evaluations into a model's card: table, picture and metadata. What people wrote into the card stays."""
    parser = argparse.ArgumentParser(prog=program, description=run.__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="the model, as `relay-hf train` or `save_pretrained` wrote it")
    parser.add_argument("run", metavar="RUN", help="output folder of `relay-hf eval` on this model")
    parser.add_argument("others", metavar="OTHER", nargs="*", help="those of models that it is compared with")
    arguments = parser.parse_args(argv)
    print(add_to_card(arguments.folder, [arguments.run, *arguments.others]))
