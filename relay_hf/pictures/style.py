"""What the pictures share: sizes, colours, and how a figure is begun and written."""

from collections.abc import Iterable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette, distinct in every common form of colour blindness; the marker says it a second time.
STYLES = {
    "relay": ("#D55E00", "o"),
    "rollout": ("#0072B2", "s"),
    "masked": ("#7A7A7A", "^"),
    "relay_sg": ("#E69F00", "D"),
    "complementary": ("#CC79A7", "v"),
    "rcd": ("#009E73", "P"),
}
SPARE_STYLES = (
    ("#56B4E9", "p"),
    ("#000000", "d"),
    ("#882255", "<"),
    ("#B8A600", "h"),
    ("#44AA99", ">"),
    ("#332288", "8"),
)

WIDTH, HEIGHT, DPI = 6.4, 4.4, 200  # inches, inches, pixels per inch
INK, FAINT = "#222222", "#6E6E6E"


def choose_styles(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Label -> (colour, marker). Objectives of relay_hf have their own; other labels share the rest by alphabet."""
    labels = list(labels)
    others = sorted(label for label in labels if label not in STYLES)
    spare = {label: SPARE_STYLES[index % len(SPARE_STYLES)] for index, label in enumerate(others)}
    return {label: STYLES.get(label) or spare[label] for label in labels}


def new_figure(title: str, width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """An empty figure of `width` x `height` inches under its title."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK, wrap=True)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes the figure as PNG, into a folder that is made if need be; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
