"""The command line `relay-hf`: finds the command and turns what goes wrong into one sentence."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from typing import Any

from .startup.one_line import one_line
from .startup.plain_stream import PlainStream
from .version import __version__

# Command -> what it does, in the order of the help. Each is a file of `relay_hf.commands`.
COMMANDS = {
    "convert": "make a relay model of a causal decoder, Fast-dLLM v2, SDAR, LLaDA or Dream",
    "prepare-data": "make the training data of the published recipe",
    "traces": "let a model answer prompts, and keep the order in which it revealed each token, to train on",
    "train": "train a relay model, from a YAML recipe or from options",
    "generate": "answer a prompt, and count the forwards it took",
    "chat": "talk with a relay model in the terminal",
    "serve": "answer requests of OpenAI clients with a relay model",
    "push": "upload a relay model, or an adapter of one, to the Hub in one commit",
    "eval": "answer HumanEval or MBPP problems: accuracy, and the forwards it took, at one or more thresholds",
    "compare": "compare two evaluations problem by problem, and say whether chance explains the difference",
    "card": "write evaluations into the card of the model that was evaluated",
    "demo": "train Relay and its baselines on Sudoku, compare them, save the model and watch it solve a puzzle",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `relay-hf`; returns 0, or 2 after printing one sentence about what was wrong.

    As shells count signals, it is 130 after Ctrl-C, and 141 if the reader of the output has gone.
    """
    try:
        try:
            with _plain_errors():
                return _run(argv)
        finally:
            sys.stdout.flush()  # also of `--help`, which leaves by an exception
    except BrokenPipeError:
        # `head`, for instance, has what it wanted. Python flushes the rest when it closes the output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("relay-hf: interrupted", file=sys.stderr)
        return 130


def _plain_errors() -> AbstractContextManager[Any]:
    """Where stderr is no terminal, colours of the libraries' messages are left out."""
    plain: Any = PlainStream(sys.stderr)
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(plain)


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="relay-hf",
        description="Relay for masked diffusion language models.",
        epilog="`relay-hf COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        # The command parses the rest itself, `--help` included.
        commands.add_parser(name, help=purpose, add_help=False, prefix_chars="\0")
    chosen, rest = parser.parse_known_args(argv)
    command = importlib.import_module(f"relay_hf.commands.{chosen.command.replace('-', '_')}")
    try:
        command.run(f"relay-hf {chosen.command}", rest)
    except BrokenPipeError:
        raise
    # OSError: files, folders, the Hub and addresses; ArithmeticError: a loss that is no number.
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        print(f"relay-hf: error: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        # As the system raises it, it says neither what it is about nor what to do.
        return f"`{error.filename}` cannot be read or written ({error.strerror}): check the path and its permissions."
    return one_line(error)
