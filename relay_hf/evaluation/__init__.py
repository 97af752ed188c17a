"""Evaluation with lm-evaluation-harness: `python -m relay_hf.evaluation --model relay ...`, see docs/evaluation.md."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .likelihood import LikelihoodBound

__all__ = ["LikelihoodBound"]

__getattr__ = lazy_names(__name__, {"LikelihoodBound": "likelihood"})
