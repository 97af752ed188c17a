"""The command line `relay-hf`: parses arguments and calls the library."""

import argparse
import sys
from collections.abc import Sequence

from transformers import HfArgumentParser

from .demo import DemoArguments, run_demo


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `relay-hf`; returns 0, or 2 after printing one sentence about what was wrong with the arguments."""
    parser = argparse.ArgumentParser(prog="relay-hf", description="Relay for masked diffusion language models.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=HfArgumentParser)
    commands.add_parser(
        "demo",
        dataclass_types=DemoArguments,
        help="train Relay and its baselines on Sudoku, compare them, save the model and watch it solve a puzzle",
    )
    options = vars(parser.parse_args(argv))
    options.pop("command")
    try:
        run_demo(DemoArguments(**options))
    except (ValueError, OSError) as error:  # OSError: files, folders and the Hub
        print(f"relay-hf: error: {error}", file=sys.stderr)
        return 2
    return 0
