"""`relay-hf compare`."""

from collections.abc import Sequence

from ..evaluation.code import CompareArguments
from .parser import make_parser, parse


def run(program: str, argv: Sequence[str]) -> None:
    """Compares two evaluations problem by problem, and says whether chance explains the difference."""
    positionals = dict.fromkeys("AB", "output folder of `relay-hf eval`, or a file in it")
    arguments, where = parse(make_parser(program, positionals, CompareArguments, run.__doc__), argv)
    # Not above: `--help` would wait for matplotlib.
    from ..evaluation import compare_runs

    print(compare_runs(where.a, where.b, arguments.picture))
