"""`relay-hf convert`."""

from collections.abc import Sequence

from ..conversion import ConvertArguments
from .parser import make_parser, parse


def run(program: str, argv: Sequence[str]) -> None:
    """Makes a relay model of a causal decoder, Fast-dLLM v2, SDAR, LLaDA or Dream."""
    parser = make_parser(program, "SOURCE OUTPUT", ConvertArguments, run.__doc__)
    parser.add_argument(
        "source", metavar="SOURCE", help="the checkpoint: a folder, a GGUF file, or a repository of the Hub"
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must not exist, or be empty")
    arguments, where = parse(parser, argv)
    # Not above: `--help` and refused options would wait for torch.
    from ..conversion import convert

    print(convert(where.source, where.output, **arguments.options()))
