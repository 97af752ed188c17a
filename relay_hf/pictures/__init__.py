"""Pictures and the terminal: how a row was denoised, how a training went, what accuracy costs in forwards.

Only matplotlib's object-oriented API on the Agg canvas is used: no window, and no state shared with the user's figures.
"""

from typing import TYPE_CHECKING

from ..startup.lazy_names import lazy_names

if TYPE_CHECKING:
    from .accuracy import CurvePoint, draw_accuracy_against_forwards, plot_accuracy_against_forwards
    from .denoising import draw_denoising, plot_denoising
    from .timeline import show_denoising
    from .training import plot_training

__all__ = [
    "CurvePoint",
    "draw_accuracy_against_forwards",
    "draw_denoising",
    "plot_accuracy_against_forwards",
    "plot_denoising",
    "plot_training",
    "show_denoising",
]

__getattr__ = lazy_names(__name__)
