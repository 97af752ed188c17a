"""The accuracy-against-forwards picture: what is drawn, where the small numbers go, and what is refused."""

import importlib
import struct
import sys
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex

from relay_hf.pictures.accuracy import (
    CurvePoint,
    draw_accuracy_against_forwards,
    plot_accuracy_against_forwards,
)
from relay_hf.pictures.style import STYLES, choose_styles

CURVES = {
    "masked": [CurvePoint(0.05, 8.5, 0.901), CurvePoint(0.15, 6.5, 0.748), CurvePoint(0.5, 4.4, 0.229)],
    "relay": [CurvePoint(0.5, 4.1, 0.327, 0.02), CurvePoint(0.05, 7.9, 0.938, 0.01), CurvePoint(0.15, 5.8, 0.797)],
}


def labelled_lines(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def walk(corners, steps=500):
    """Positions along a polyline."""
    for start, stop in pairwise(corners):
        yield from (start + (stop - start) * step / steps for step in range(steps + 1))


def test_picture_is_a_png_of_the_promised_size(tmp_path):
    path = plot_accuracy_against_forwards(CURVES, tmp_path / "new" / "accuracy.png")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1280, 880)


def test_picture_has_one_line_per_label_in_percent_from_left_to_right():
    axes = draw_accuracy_against_forwards(CURVES).axes[0]
    lines = labelled_lines(axes)
    assert set(lines) == {"masked", "relay"}
    np.testing.assert_allclose(lines["relay"].get_xydata(), [(4.1, 32.7), (5.8, 79.7), (7.9, 93.8)])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["masked", "relay"]


def test_picture_labels_say_title_metric_and_unit():
    figure = draw_accuracy_against_forwards(CURVES, "HumanEval", metric="pass@1", unit="problem")
    assert figure.get_suptitle() == "HumanEval"
    assert figure.axes[0].get_ylabel() == "pass@1 (%)"
    assert figure.axes[0].get_xlabel() == "mean denoise forwards per problem"
    timed = draw_accuracy_against_forwards(CURVES, unit="problem", cost="ms")
    assert timed.axes[0].get_xlabel() == "mean ms per problem"


def test_spread_is_drawn_as_error_bars():
    (bars,) = draw_accuracy_against_forwards(CURVES).axes[0].collections  # of `relay`; `masked` has no spread
    heights = [np.ptp(segment[:, 1]) for segment in bars.get_segments()]
    np.testing.assert_allclose(heights, [4.0, 0.0, 2.0], atol=1e-9)


def test_style_of_a_label_does_not_depend_on_its_company():
    alone = draw_accuracy_against_forwards({"relay": CURVES["relay"]}).axes[0]
    together = draw_accuracy_against_forwards(CURVES).axes[0]
    for axes in (alone, together):
        line = labelled_lines(axes)["relay"]
        assert (to_hex(line.get_color()).upper(), line.get_marker()) == STYLES["relay"]


def test_styles_of_different_labels_differ():
    styles = choose_styles([*STYLES, "a", "b", "c"])
    assert len({colour for colour, _ in styles.values()}) == len({marker for _, marker in styles.values()}) == 9
    assert choose_styles(["c", "a", "b"])["a"] == styles["a"]


def test_thresholds_are_written_where_there_is_room():
    axes = draw_accuracy_against_forwards(CURVES).axes[0]
    assert sorted(text.get_text() for text in axes.texts if text.get_text()[0].isdigit()) == [
        "0.05",
        "0.05",
        "0.15",
        "0.15",
        "0.5",
        "0.5",
    ]


CROWDS = {
    "crossing": {
        str(k): [CurvePoint(t, 5 + t + k / 50, 0.5 + t + k / 90) for t in (0.1, 0.12, 0.15)] for k in range(5)
    },
    "stacked": {"relay": [CurvePoint(0.15, 5.0, 0.5)], "rollout": [CurvePoint(0.25, 5.0, 0.502)]},
}


@pytest.mark.parametrize("curves", CROWDS.values(), ids=CROWDS)
def test_thresholds_never_overlap(curves):
    figure = draw_accuracy_against_forwards(curves)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()[0].isdigit()]
    assert boxes
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_thresholds_never_cover_a_curve():
    curves = {
        "relay": [CurvePoint(t, 4 + 4 * t, 0.3 + 0.6 * t, 0.02) for t in (0.1, 0.3, 0.5, 0.7, 0.9)],
        "rollout": [CurvePoint(t, 4 + 4 * t, 0.9 - 0.6 * t) for t in (0.1, 0.3, 0.5, 0.7, 0.9)],
    }
    axes = draw_accuracy_against_forwards(curves).axes[0]
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()[0].isdigit()]
    assert len(boxes) >= 6
    for line in labelled_lines(axes).values():
        corners = line.get_path().transformed(axes.transData).vertices
        inside = [box.contains(x, y) for box in boxes for x, y in walk(corners)]
        assert not any(inside)


def test_points_without_threshold_need_no_explanation():
    axes = draw_accuracy_against_forwards({"relay": [CurvePoint(None, 5.0, 0.5)]}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["↖ better: up and to the left"]


def test_ticks_stop_at_100_percent_where_the_error_bar_does_not():
    axes = draw_accuracy_against_forwards({"relay": [CurvePoint(0.5, 4.0, 0.8), CurvePoint(0.1, 5.0, 1.0, 0.1)]}).axes[
        0
    ]
    assert max(axes.get_yticks()) == 100
    assert axes.get_ylim()[1] > 110


def test_ticks_do_not_stretch_the_picture():
    axes = draw_accuracy_against_forwards({"relay": [CurvePoint(0.5, 4.0, 0.1), CurvePoint(0.1, 5.0, 0.73)]}).axes[0]
    assert axes.get_ylim()[1] == pytest.approx(1.16 * 73)


@pytest.mark.parametrize("accuracies", [(0.9, 0.95), (0.0, 0.0), (0.02, 1.0)])
def test_axes_start_at_zero(accuracies):
    low, high = accuracies
    points = [CurvePoint(0.5, 60.0, low, 0.05), CurvePoint(0.1, 66.0, high, 0.05)]
    axes = draw_accuracy_against_forwards({"relay": points}).axes[0]
    assert (axes.get_xlim()[0], axes.get_ylim()[0]) == (0, 0)
    assert axes.get_xlim()[1] > 66


@pytest.mark.parametrize(
    ("curves", "message"), [({}, "`curves` is empty"), ({"relay": []}, r"\['relay'\] have no points")]
)
def test_nothing_to_draw_raises_and_writes_nothing(tmp_path, curves, message):
    with pytest.raises(ValueError, match=message):
        plot_accuracy_against_forwards(curves, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"accuracy": 93.8}, "write 93.8 % as 0.938"),
        ({"accuracy": float("nan")}, "not a fraction"),
        ({"forwards": -1.0}, "no number of forwards"),
        ({"forwards": float("nan")}, "no number of forwards"),
        ({"spread": -0.1}, "`spread=-0.1`"),
    ],
)
def test_point_out_of_range_raises(point, message):
    with pytest.raises(ValueError, match=message):
        CurvePoint(**{"threshold": 0.1, "forwards": 5.0, "accuracy": 0.5, **point})


def test_drawing_needs_no_pyplot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    for name in ("style", "accuracy"):
        monkeypatch.delitem(sys.modules, f"relay_hf.pictures.{name}")
    module = importlib.import_module("relay_hf.pictures.accuracy")
    points = [module.CurvePoint(0.1, 5.0, 0.5)]
    assert module.plot_accuracy_against_forwards({"relay": points}, tmp_path / "a.png").is_file()
