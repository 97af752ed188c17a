"""The picture that every study of decoding speed ends in: accuracy against denoise forwards.

curves = {"relay": [CurvePoint(0.15, forwards=5.8, accuracy=0.797), ...], "rollout": [...]}
plot_accuracy_against_forwards(curves, "accuracy.png", title="6x6 Sudoku", unit="puzzle")
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from .style import DPI, FAINT, INK, choose_styles, new_figure, save_figure

NUMBER_SIZE = 7.0  # points, of the thresholds


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation: what a decoding threshold costs and what it gives.

    Args:
        threshold: unmasking threshold, written beside the point; `None` writes nothing.
        forwards: mean denoise forwards per sample, or what else `cost` names.
        accuracy: fraction in [0, 1].
        spread: half the length of the error bar, a fraction too, for instance the standard deviation over seeds.

    Raises:
        ValueError: a number is out of its range.
    """

    threshold: float | None
    forwards: float
    accuracy: float
    spread: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.accuracy <= 1:
            raise ValueError(f"`accuracy={self.accuracy}` is not a fraction: write 93.8 % as 0.938.")
        if not 0 <= self.forwards < math.inf:
            raise ValueError(f"`forwards={self.forwards}` is no number of forwards: give a mean of 0 or more.")
        if self.spread is not None and not 0 <= self.spread <= 1:
            raise ValueError(f"`spread={self.spread}` is not a fraction of 0 or more: write 1.2 points as 0.012.")


def plot_accuracy_against_forwards(
    curves: Mapping[str, Sequence[CurvePoint]],
    path: str | FilePath,
    title: str = "Accuracy against denoise forwards",
    *,
    metric: str = "Exact match",
    unit: str = "puzzle",
    cost: str = "denoise forwards",
) -> FilePath:
    """Draw one curve per objective and write it as PNG (1280 x 880 pixels).

    Args:
        curves: label -> points, in any order. The label decides colour and marker, in this and in every other picture.
        path: the PNG file; its folder is made if need be.
        title: the title of the picture.
        metric, unit, cost: names for the axes: "`metric` (%)" against "mean `cost` per `unit`".

    Returns: the path.
    Raises: ValueError if no curve has a point.
    """
    return save_figure(draw_accuracy_against_forwards(curves, title, metric=metric, unit=unit, cost=cost), path)


def draw_accuracy_against_forwards(
    curves: Mapping[str, Sequence[CurvePoint]],
    title: str = "Accuracy against denoise forwards",
    *,
    metric: str = "Exact match",
    unit: str = "puzzle",
    cost: str = "denoise forwards",
) -> Figure:
    """The figure itself, for notebooks and other formats; arguments as in `plot_accuracy_against_forwards`."""
    if not curves:
        raise ValueError("`curves` is empty: give at least one label with its points.")
    if empty := [label for label, points in curves.items() if not points]:
        raise ValueError(f"The curves {empty} have no points: leave them out, or evaluate them at a threshold.")

    figure = new_figure(title)
    axes = figure.add_subplot()
    styles = choose_styles(curves)
    ordered = {label: sorted(points, key=lambda point: point.forwards) for label, points in curves.items()}
    for label, points in ordered.items():
        _draw_curve(axes, label, points, *styles[label])
    every_point = [point for points in ordered.values() for point in points]
    _set_limits(axes, every_point)
    _dress_axes(
        axes,
        metric,
        f"mean {cost} per {unit}",
        has_thresholds=any(point.threshold is not None for point in every_point),
    )
    # The layout must be final before anything is measured in pixels.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    _write_thresholds(axes, ordered, {label: colour for label, (colour, _) in styles.items()})
    return figure


def _ends_of_bar(point: CurvePoint) -> tuple[float, float]:
    """Lower and upper end of the error bar, in percent; the point itself if it has none."""
    spread = point.spread or 0.0
    return 100 * (point.accuracy - spread), 100 * (point.accuracy + spread)


def _draw_curve(axes: Axes, label: str, points: Sequence[CurvePoint], colour: str, marker: str) -> None:
    x = [point.forwards for point in points]
    y = [100 * point.accuracy for point in points]
    axes.plot(
        x, y, label=label, color=colour, marker=marker, markersize=6.5, markeredgecolor="white", markeredgewidth=0.7,
        linewidth=1.8, solid_capstyle="round", clip_on=False, zorder=3,
    )  # fmt: skip
    if any(point.spread for point in points):
        spread = [100 * (point.spread or 0.0) for point in points]
        axes.errorbar(x, y, spread, fmt="none", ecolor=colour, elinewidth=1.1, capsize=2.5, capthick=1.1, zorder=2)


def _set_limits(axes: Axes, points: Sequence[CurvePoint]) -> None:
    """Both axes start at 0, so that lengths compare; room above the points for the hint; no tick above 100 %."""
    highest = max(max(_ends_of_bar(point)[1] for point in points), 8.0)
    top = 1.16 * highest
    ticks = MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(0.0, min(top, 100.0))
    axes.set_ylim(0.0, top)
    axes.set_yticks([tick for tick in ticks if tick <= top])
    axes.set_xlim(0.0, 1.06 * max(max(point.forwards for point in points), 1.0))


def _dress_axes(axes: Axes, metric: str, cost: str, has_thresholds: bool) -> None:
    axes.set_xlabel(cost, color=INK, fontsize=10)
    axes.set_ylabel(f"{metric} (%)", color=INK, fontsize=10)
    axes.text(0.015, 0.975, "↖ better: up and to the left", va="top", **_small_print(axes))
    if has_thresholds:
        axes.text(0.995, 0.975, "small numbers: unmasking threshold", va="top", ha="right", **_small_print(axes))
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(color="#BBBBBB", labelcolor=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(labels), 4), frameon=False,
        fontsize=9, labelcolor=INK, handlelength=2.2,
    )  # fmt: skip


def _small_print(axes: Axes) -> dict[str, Any]:
    halo = [withStroke(linewidth=2, foreground="white")]
    return {"transform": axes.transAxes, "fontsize": 8, "color": FAINT, "style": "italic", "path_effects": halo}


def _write_thresholds(axes: Axes, curves: Mapping[str, Sequence[CurvePoint]], colours: Mapping[str, str]) -> None:
    """Write each threshold beside its point where it covers nothing; one that finds no room is left out."""
    strokes = {label: _strokes(axes, points) for label, points in curves.items()}
    written: list[Bbox] = []
    for label, points in curves.items():
        others = [stroke for other in strokes if other != label for stroke in strokes[other]]
        for point in [point for point in points if point.threshold is not None]:
            text, place = f"{point.threshold:g}", (point.forwards, 100 * point.accuracy)
            here = axes.transData.transform(place)
            box = _find_room(here, len(text), strokes[label], others, written, axes.get_window_extent())
            if box is None:
                continue
            written.append(box)
            axes.annotate(
                text, place, xytext=(box.get_points().mean(0) - here) * 72 / DPI, textcoords="offset points",
                ha="center", va="center", fontsize=NUMBER_SIZE, color=colours[label],
                path_effects=[withStroke(linewidth=1.5, foreground="white")], zorder=4,
            )  # fmt: skip


def _find_room(
    here: np.ndarray, characters: int, own: list[Path], others: list[Path], written: list[Bbox], frame: Bbox
) -> Bbox | None:
    """The first free place around a point for a number, in pixels; None if every place is taken.

    Args: here: (2,) the point. own, others: strokes of the point's curve and of the other curves. written: boxes of the
        numbers so far. frame: the box to stay in.
    """
    pixels = DPI / 72  # per typographic point
    half = np.array([0.33 * characters + 0.15, 0.5]) * NUMBER_SIZE * pixels  # of the text, with some air
    for direction in ((1, -1), (-1, 1), (1, 0), (-1, 0), (0, -1), (0, 1), (1, 1), (-1, -1)):
        middle = here + np.array(direction) * (half + 4.2 * pixels)
        box = Bbox([middle - half, middle + half])
        # Between a number and its point no other curve may pass, or it would seem to belong there.
        reach = Bbox.union([box, Bbox([here, here])])
        is_inside = bool(np.all(box.min >= frame.min) and np.all(box.max <= frame.max))
        is_free = not box.count_overlaps(written) and not any(stroke.intersects_bbox(box, False) for stroke in own)
        if is_inside and is_free and not any(stroke.intersects_bbox(reach, False) for stroke in others):
            return box
    return None


def _strokes(axes: Axes, points: Sequence[CurvePoint]) -> list[Path]:
    """What a curve covers, in pixels: its line, and at every point the error bar, or a dot."""
    line = axes.transData.transform([(point.forwards, 100 * point.accuracy) for point in points])
    bars = [axes.transData.transform([(point.forwards, end) for end in _ends_of_bar(point)]) for point in points]
    return [Path(line), *(Path(bar + [(0, -1), (0, 1)]) for bar in bars)]  # noqa: RUF005  (arrays are added)
