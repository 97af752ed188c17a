"""`relay-hf eval`."""

from collections.abc import Sequence

from ..evaluation.code import CodeEvalArguments, run_evaluation
from .parser import MODEL, make_parser, parse


def run(program: str, argv: Sequence[str]) -> None:
    """Answers HumanEval or MBPP problems: accuracy, and the forwards it took, at one or more thresholds."""
    arguments, where = parse(make_parser(program, MODEL, CodeEvalArguments, run.__doc__), argv)
    print(run_evaluation(where.path_or_repo, arguments))
