"""Evaluation: how good the text is, and how many forwards it took; see docs/evaluation.md.

`code` answers HumanEval and MBPP (`relay-hf eval`, `relay-hf compare`), `harness` is the model `relay` of
lm-evaluation-harness (`python -m relay_hf.evaluation --model relay ...`), `cards` writes the results of both into a
model's card (`relay-hf card`). What is beside them serves both.
"""

from typing import TYPE_CHECKING

from ..startup.lazy_names import lazy_names

if TYPE_CHECKING:
    from .cards.code_runs import add_runs
    from .cards.harness_results import add_results
    from .code.arguments import CodeEvalArguments
    from .code.compare import compare_runs
    from .code.evaluate import evaluate_code
    from .code.report import format_table
    from .likelihood import LikelihoodBound

__all__ = [
    "CodeEvalArguments",
    "LikelihoodBound",
    "add_results",
    "add_runs",
    "compare_runs",
    "evaluate_code",
    "format_table",
]

__getattr__ = lazy_names(__name__)
