"""`relay-hf eval`."""

from collections.abc import Sequence

from ..evaluation.code import CodeEvalArguments, run_evaluation
from .parser import make_parser, parse


def run(program: str, argv: Sequence[str]) -> None:
    """Answers HumanEval or MBPP problems: accuracy, and the forwards it took, at one or more thresholds."""
    parser = make_parser(program, "PATH_OR_REPO", CodeEvalArguments, run.__doc__)
    parser.add_argument("model", metavar="PATH_OR_REPO", help="the model: a folder, or a repository of the Hub")
    arguments, where = parse(parser, argv)
    print(run_evaluation(where.model, arguments))
