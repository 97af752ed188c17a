"""The picture of a training run: losses against optimizer steps, how far the channel has opened, how fast it decodes.

plot_training(trainer.state.log_history, "training.png")
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from .style import FAINT, INK, STYLES, new_figure, save_figure

# Logged name -> label, colour and marker.
LOSSES = {"loss": ("training", *STYLES["rollout"]), "eval_loss": ("evaluation", *STYLES["relay"])}
# Logged name -> label and colour of a panel of its own, below the losses.
OTHERS = {
    "relay_weight_norm": ("norm of the\nchannel's weight", STYLES["relay_sg"][0]),
    "eval_sample_tokens_per_denoise_forward": ("tokens per\ndenoise forward", STYLES["relay"][0]),
}


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
    others = {name: points for name in OTHERS if (points := logged(log_history, name))}
    figure = new_figure(title)
    panels = figure.subplots(1 + len(others), squeeze=False, sharex=True, height_ratios=[3] + [1] * len(others))
    axes = panels[0, 0]
    for name, points in curves.items():
        label, colour, marker = LOSSES[name]
        axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=4, linewidth=1.6)
    axes.set_ylabel("loss", color=INK)
    axes.legend(frameon=False)
    for panel, (name, points) in zip(panels[1:, 0], others.items(), strict=True):
        label, colour = OTHERS[name]
        panel.plot(*zip(*points, strict=True), color=colour, marker=".", linewidth=1.6)
        panel.set_ylabel(label, color=INK)
    panels[-1, 0].set_xlabel("optimizer steps", color=INK)
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in panels[:, 0]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    return save_figure(figure, path)


def logged(log_history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of each entry that has a number of that name."""
    return [(int(entry["step"]), float(entry[name])) for entry in log_history if name in entry]
