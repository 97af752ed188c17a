"""The picture of a training run: losses against optimizer steps, and how far the channel has opened.

plot_training(trainer.state.log_history, "training.png")
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from .style import FAINT, INK, STYLES, new_figure, save_figure

# Logged name -> label, colour and marker.
LOSSES = {"loss": ("training", *STYLES["rollout"]), "eval_loss": ("evaluation", *STYLES["relay"])}
CHANNEL_NORM, CHANNEL_COLOUR = "relay_weight_norm", STYLES["relay_sg"][0]


def plot_training(log_history: Sequence[Mapping[str, Any]], path: str | Path, title: str = "Training") -> Path:
    """Draw what a Trainer logged and write it as PNG.

    Args:
        log_history: `trainer.state.log_history`.
        path: the PNG file; its folder is made if need be.
        title: the title of the picture.

    Returns: the path.
    Raises: ValueError if no loss was logged.
    """
    curves = {name: points for name in LOSSES if (points := logged(log_history, name))}
    if not curves:
        raise ValueError("`log_history` has no losses: train with `logging_steps` smaller than the run.")
    norms = logged(log_history, CHANNEL_NORM)
    figure = new_figure(title)
    panels = figure.subplots(2 if norms else 1, squeeze=False, sharex=True, height_ratios=[3, 1] if norms else None)
    axes = panels[0, 0]
    for name, points in curves.items():
        label, colour, marker = LOSSES[name]
        axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=4, linewidth=1.6)
    axes.set_ylabel("loss", color=INK)
    axes.legend(frameon=False)
    if norms:
        panels[1, 0].plot(*zip(*norms, strict=True), color=CHANNEL_COLOUR, marker=".", linewidth=1.6)
        panels[1, 0].set_ylabel("norm of the\nchannel's weight", color=INK)
    panels[-1, 0].set_xlabel("optimizer steps", color=INK)
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in panels[:, 0]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    return save_figure(figure, path)


def logged(log_history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of each entry that has a number of that name."""
    return [(int(entry["step"]), float(entry[name])) for entry in log_history if name in entry]
