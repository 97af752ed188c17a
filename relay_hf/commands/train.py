"""`relay-hf train`."""

import argparse
from collections.abc import Sequence

from .train_arguments import help_text, parse


def run(program: str, argv: Sequence[str]) -> None:
    """Trains a relay model with RelayTrainer; the output holds the model, its tokenizer and its card."""
    first = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("-h", "--help", action="store_true")
    first.add_argument("--help_all", "--help-all", action="store_true")
    asked, rest = first.parse_known_args(argv)
    if asked.help or asked.help_all:
        print(help_text(program, run.__doc__, everything=asked.help_all))
        return
    if asked.config is None and rest and not rest[0].startswith("-"):
        raise ValueError(f"`{rest[0]}` is not an option of `{program}`: did you mean `--config {rest[0]}`?")
    arguments = parse(program, asked.config, rest)
    # Not above: `--help` and refused options would wait for the trainer.
    from .training import train

    train(arguments, program, argv)
