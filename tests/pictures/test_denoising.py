"""The grid picture of a history: which colours, which labels, how large, and what is refused."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from relay_hf import RelayGenerateHistory, plot_denoising
from relay_hf.pictures import denoising as module
from relay_hf.pictures.denoising import FREE, GIVEN, MASKED, draw_denoising

from .test_timeline import BLOCKS, CANVAS, TEXTS, make_history


def cells_of(axes: Axes) -> np.ndarray:
    """(forwards + 1, N, 3) what the grid shows."""
    return np.asarray(axes.images[0].get_array())


def is_colour(cells: np.ndarray, colour: str) -> np.ndarray:
    return np.isclose(cells, to_rgb(colour)).all(-1)


def test_plot_writes_a_png_and_returns_its_path(tmp_path: Path) -> None:
    path = tmp_path / "new" / "denoising.png"
    assert plot_denoising(BLOCKS, path=path, tokens=TEXTS) == path
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (920, 560)


def test_grid_masked_given_and_free_cells() -> None:
    cells = cells_of(draw_denoising(BLOCKS, TEXTS).axes[0])
    assert cells.shape == (4, 8, 3)  # without the padding
    masked = [[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1], [0] * 8]
    assert is_colour(cells, MASKED).astype(int).tolist() == masked
    assert is_colour(cells, GIVEN).astype(int).tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]] * 4
    # Behind the prefill, and behind the commit that follows the second forward.
    assert np.argwhere(is_colour(cells, FREE)).tolist() == [[0, 2], [2, 6]]


def test_grid_colour_is_full_once_and_pale_after() -> None:
    cells = cells_of(draw_denoising(CANVAS).axes[0])
    first, last = (np.array(colormaps["viridis"](place)[:3]) for place in (0.0, 1.0))
    np.testing.assert_allclose(cells[1, 3], first)
    np.testing.assert_allclose(cells[2, 1], last)
    assert (cells[2, 3] > first).all()  # closer to white
    assert not is_colour(cells[2], MASKED).any()


def test_grid_colour_by_confidence_ignores_the_step() -> None:
    history = RelayGenerateHistory(CANVAS.revealed_at, torch.tensor([[0, 0.25, 0, 1.0, 0]]), *CANVAS.to_tuple()[2:])
    figure = draw_denoising(history, color_by="confidence")
    cells = cells_of(figure.axes[0])
    np.testing.assert_allclose(cells[1, 3], colormaps["viridis_r"](1.0)[:3])
    np.testing.assert_allclose(cells[2, 1], colormaps["viridis_r"](0.25)[:3])
    assert figure.axes[1].get_ylabel() == "probability when revealed"


def test_labels_are_tokens_without_mathematics() -> None:
    axes = draw_denoising(make_history([0, 1, 2, 3], given=1), ["$a", " b$", "  ", "internationally"]).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["$a", "b$", "␣", "internati…"]
    assert not any(text.get_parse_math() for text in axes.get_xticklabels())
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("denoise forward", "")


def test_labels_without_tokens_are_positions() -> None:
    assert draw_denoising(CANVAS).axes[0].get_xlabel() == "position"


@pytest.mark.parametrize(("history", "entries"), [(BLOCKS, 3), (CANVAS, 2)])
def test_legend_names_free_tokens_where_there_are_some(history: RelayGenerateHistory, entries: int) -> None:
    legend = [text.get_text() for text in draw_denoising(history).axes[0].get_legend().get_texts()]
    assert legend == ["masked", "given", "scored by a prefill or commit"][:entries]


def test_skip_prompt_and_row_choose_what_is_drawn() -> None:
    both = RelayGenerateHistory(*(torch.cat([tensor, tensor.flip(-1)]) for tensor in BLOCKS.to_tuple()))
    assert cells_of(draw_denoising(both, skip_prompt=True).axes[0]).shape[1] == 6
    other = cells_of(draw_denoising(both, row=1).axes[0])
    assert is_colour(other[0], GIVEN).astype(int).tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


def test_long_history_stays_a_picture_of_bounded_size_with_numbered_positions() -> None:
    figure = draw_denoising(make_history(list(range(1, 401)) * 3), ["ab"] * 1200)
    assert figure.get_size_inches().tolist() == [20, 16]
    assert figure.axes[0].get_xlabel() == "position"


@pytest.mark.parametrize(("last", "ticks"), [(0, [0]), (1, [0, 1])])
def test_row_of_one_forward_or_none_needs_no_scale(tmp_path: Path, last: int, ticks: list[int]) -> None:
    history = make_history([0, last], given=1)
    figure = draw_denoising(history, "ab")
    (axes,) = figure.axes
    assert [tick for tick in axes.get_yticks() if -0.5 <= tick <= last + 0.5] == ticks
    assert cells_of(axes).shape == (last + 1, 2, 3)
    assert plot_denoising(history, tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"color_by": "colour"}, '`color_by=\'colour\'` is unknown: choose "step" or "confidence"'),
        ({"row": 3}, "`row=3` is not in the history"),
        ({"tokens": "ab"}, "`tokens` has 2 texts, but a row has 5 positions"),
    ],
)
def test_wrong_argument_raises_and_writes_nothing(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_denoising(CANVAS, tmp_path / "a.png", **options)
    assert not (tmp_path / "a.png").exists()


def test_drawing_needs_no_pyplot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    assert "pyplot" not in Path(module.__file__).read_text()
    assert plot_denoising(CANVAS, tmp_path / "a.png").is_file()
