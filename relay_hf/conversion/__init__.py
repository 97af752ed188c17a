"""Conversion of checkpoints: `relay_hf.convert(source, output)` and `relay-hf convert SOURCE OUTPUT`."""

from typing import TYPE_CHECKING

from ..startup.lazy_names import lazy_names
from .report import ConversionReport

if TYPE_CHECKING:
    from .checkpoint import convert

__all__ = ["ConversionReport", "convert"]

__getattr__ = lazy_names(__name__)
