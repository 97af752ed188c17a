"""Conversion of checkpoints: `relay_hf.convert(source, output)` and `relay-hf convert SOURCE OUTPUT`."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names
from .arguments import ConvertArguments
from .report import ConversionReport

if TYPE_CHECKING:
    from .checkpoint import convert

__all__ = ["ConversionReport", "ConvertArguments", "convert"]

__getattr__ = lazy_names(__name__, {"convert": "checkpoint"})
