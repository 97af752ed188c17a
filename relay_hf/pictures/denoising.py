"""The picture of a row being written: position from left to right, denoise forward from top to bottom.

plot_denoising(output.history, "denoising.png", tokenizer.batch_decode(output.sequences[0][:, None]))
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..modeling import RelayGenerateHistory
from .style import FAINT, INK, new_figure, save_figure
from .timeline import Timeline, read_history

CELL = 0.2  # inches, of a square cell as long as the picture has room
MARGINS = (1.9, 1.6)  # inches, beside and above the grid, for labels and the colour bar
SMALLEST, LARGEST = (4.6, 2.8), (20.0, 16.0)  # inches, of the picture
LABEL_LENGTH = 10  # characters of a token that are written
LABEL_SIZES = (3.0, 8.0)  # points; smaller ones are left out
MASKED, GIVEN, FREE = "#FFFFFF", "#D0D0D0", "#E69F00"
PALE = 0.35  # how much of its colour a token keeps after the forward that revealed it


def plot_denoising(
    history: RelayGenerateHistory,
    path: str | Path,
    tokens: Sequence[str] | None = None,
    *,
    row: int = 0,
    color_by: Literal["step", "confidence"] = "step",
    skip_prompt: bool = False,
    title: str = "Which denoise forward revealed which token",
) -> Path:
    """Draw one row of a history and write it as PNG.

    A line of the grid is what is known after a denoise forward (0 = before the first): full colour for what the forward
    revealed, pale for what was known before, white for what is still masked. Tokens that a prefill or commit scored at
    no further cost are orange, in the line of the last forward before it.

    Args:
        history: the history of `generate(..., return_dict_in_generate=True, output_history=True)`.
        path: the PNG file; its folder is made if need be.
        tokens: L texts, one for each token of `sequences[row]`, for instance
            `tokenizer.batch_decode(sequences[row][:, None])`. Without them, or if they are too many to be read,
            positions are numbered from the first one drawn.
        row: index into the rows of the batch.
        color_by: meaning of the colour: the forward that revealed the token, or the token's probability then.
        skip_prompt: begin at the first position that was not given.
        title: the title of the picture.

    Returns: the path.
    Raises: ValueError if `row` is out of range, `tokens` has another length than the row, or `color_by` is unknown.
    """
    figure = draw_denoising(history, tokens, row=row, color_by=color_by, skip_prompt=skip_prompt, title=title)
    return save_figure(figure, path)


def draw_denoising(
    history: RelayGenerateHistory,
    tokens: Sequence[str] | None = None,
    *,
    row: int = 0,
    color_by: Literal["step", "confidence"] = "step",
    skip_prompt: bool = False,
    title: str = "Which denoise forward revealed which token",
) -> Figure:
    """The figure itself, for notebooks and other formats; arguments as in `plot_denoising`."""
    if color_by not in ("step", "confidence"):
        raise ValueError(f'`color_by={color_by!r}` is unknown: choose "step" or "confidence".')
    timeline = read_history(history, tokens, row, skip_prompt)
    shape = (timeline.forwards + 1, len(timeline.given))

    width = min(max(SMALLEST[0], CELL * shape[1] + MARGINS[0]), LARGEST[0])
    height = min(max(SMALLEST[1], CELL * shape[0] + MARGINS[1]), LARGEST[1])
    figure = new_figure(title, width, height)
    axes = figure.add_subplot()
    limits = (1, max(timeline.forwards, 1)) if color_by == "step" else (0, 1)
    # Even to the eye, also a colour-blind one, and never grey or white: dark is early, or sure.
    scale = ScalarMappable(Normalize(*limits), "viridis" if color_by == "step" else "viridis_r")
    axes.imshow(_cells(timeline, scale, color_by), aspect="auto", interpolation="nearest")
    _dress_axes(axes, timeline, shape, cell_width=(width - MARGINS[0]) / shape[1])
    # A single step needs no scale.
    if color_by == "confidence" or timeline.forwards > 1:
        _add_colour_bar(axes, scale, color_by)
    return figure


def _add_colour_bar(axes: Axes, scale: ScalarMappable, color_by: str) -> None:
    bar = axes.figure.colorbar(scale, ax=axes, pad=0.01, aspect=30)
    bar.set_label("revealed by denoise forward" if color_by == "step" else "probability when revealed", color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(color="#BBBBBB", labelcolor=INK, labelsize=8)
    if color_by == "step":
        bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        bar.ax.invert_yaxis()  # as the grid runs


def _cells(timeline: Timeline, scale: ScalarMappable, color_by: str) -> np.ndarray:
    """(forwards + 1, N, 3) colours of the grid."""
    value = timeline.revealed_at if color_by == "step" else timeline.confidence
    full = scale.to_rgba(np.array(value, dtype=float))[:, :3]  # (N, 3)
    full[timeline.free] = to_rgb(FREE)
    full[timeline.given] = to_rgb(GIVEN)
    pale = np.where(np.array(timeline.given)[:, None], full, 1 - PALE * (1 - full))
    step = np.arange(timeline.forwards + 1)[:, None]
    known = np.array(timeline.known_after)  # (N,)
    cells = np.where((known < step)[..., None], pale, np.array(to_rgb(MASKED)))
    return np.where((known == step)[..., None], full, cells)


def _dress_axes(axes: Axes, timeline: Timeline, shape: tuple[int, int], cell_width: float) -> None:
    """Names, ticks, lines and legend of the grid; `cell_width` in inches."""
    axes.set_ylabel("denoise forward", color=INK, fontsize=10)
    axes.yaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0, labelcolor=INK, labelsize=8)
    size = min(LABEL_SIZES[1], 0.8 * 72 * cell_width)  # no wider than a cell
    if timeline.tokens is None or size < LABEL_SIZES[0]:
        axes.set_xlabel("position", color=INK, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    else:
        labels = [_label(token) for token in timeline.tokens]
        upright = all(len(label) == 1 for label in labels)
        # Dollars of a token are no mathematics.
        style: dict[str, Any] = {"family": "monospace", "size": size, "parse_math": False}
        axes.set_xticks(range(len(labels)), labels, rotation=0 if upright else 90, **style)
    # White lines between the cells, where cells are large enough to show them.
    if max(shape) <= 130:
        axes.set_xticks(np.arange(shape[1] + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(shape[0] + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="#F2F2F2", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
    axes.spines[:].set_color("#BBBBBB")
    patches = [Patch(facecolor=MASKED, edgecolor="#BBBBBB", label="masked"), Patch(facecolor=GIVEN, label="given")]
    if any(timeline.free):
        patches.append(Patch(facecolor=FREE, label="scored by a prefill or commit"))
    axes.legend(
        handles=patches, loc="upper left", bbox_to_anchor=(0.0, -0.02), ncols=len(patches), frameon=False, fontsize=8,
        labelcolor=FAINT, handlelength=1.2, borderaxespad=0.2,
    )  # fmt: skip


def _label(token: str) -> str:
    """A token as the name of its column: a visible sign for a space, and no more than a few characters."""
    shown = token.strip() or "␣"
    return shown if len(shown) <= LABEL_LENGTH else shown[: LABEL_LENGTH - 1] + "…"
