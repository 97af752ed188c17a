"""What a page shows of a run: one cell or span per position, in its state, with nothing taken for markup."""

import re
from html import unescape
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_hf.demo.web.rendering import LEGEND, MASK, render_board, render_legend, render_side, render_text, state_of
from relay_hf.pictures.timeline import Timeline
from relay_hf.tasks.sudoku import BoardShape

SOLVED = "1234341221434321"
MARKUP = "<b onclick='x()'>&amp;{{y}}${z}</b>\"\\"


class Elements(HTMLParser):
    """All start tags with their attributes, and the text of every span and cell."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.classes: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in ("span", "td"):
            self.classes.append(dict(attributes)["class"] or "")
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        self.texts[-1] += data


def timeline_of(revealed_at: list[int], tokens: list[str], free: tuple[int, ...] = ()) -> Timeline:
    """Positions that no forward revealed are given, unless they are named as free: known after the first forward."""
    is_given = [at == 0 and position not in free for position, at in enumerate(revealed_at)]
    known = [at or (0 if is_given[position] else 1) for position, at in enumerate(revealed_at)]
    forwards = max(revealed_at, default=0)
    return Timeline(revealed_at, known, [0.5 * (at > 0) for at in revealed_at], is_given, tokens, forwards)


@pytest.mark.parametrize(
    ("step", "states"),
    [
        (0, ["given", "masked", "masked", "masked"]),
        (1, ["given", "fresh", "free", "masked"]),
        (2, ["given", "known", "known", "fresh"]),
        (3, ["given", "known", "known", "known"]),
    ],
)
def test_state_of_each_step(step: int, states: list[str]) -> None:
    timeline = timeline_of([0, 1, 0, 2], list("abcd"), free=(2,))
    assert [state_of(timeline, position, step) for position in range(4)] == states


def test_render_board_draws_boxes_and_leaves_masked_cells_empty() -> None:
    timeline = timeline_of([0, 1, 2] + [0] * 13, list(SOLVED))
    shown = Elements(render_board(timeline, 1))
    assert shown.tags.count("tr") == 4
    assert shown.texts == ["1", "2", "", *SOLVED[3:]]
    assert shown.classes[:3] == ["given", "fresh box-right", "masked"]
    assert [i for i, classes in enumerate(shown.classes) if "box-bottom" in classes] == [4, 5, 6, 7, 12, 13, 14, 15]
    assert 'title="denoise forward 1, probability 0.50"' in render_board(timeline, 1)


def test_render_board_of_no_board_raises() -> None:
    with pytest.raises(ValueError, match="not square"):
        render_board(timeline_of([0] * 5, list("12341")), 0)


def test_render_text_masks_only_the_block_at_work() -> None:
    timeline = timeline_of([0, 1, 1, 2, 3, 3], list("abcdef"))
    texts = [Elements(render_text(timeline, step, 2)).texts for step in range(4)]
    assert texts[0] == ["a", MASK]
    assert texts[1] == ["a", "b", "c", MASK]
    assert texts[2] == ["a", "b", "c", "d", MASK, MASK]
    assert texts[3] == list("abcdef")
    assert Elements(render_text(timeline, 0, None)).texts == ["a"] + [MASK] * 5


def test_render_text_breaks_lines() -> None:
    assert "↵<br></span>" in render_text(timeline_of([0, 1], ["a", "b↵"]), 1, None)


def test_render_side_escapes_and_counts() -> None:
    html = render_side(MARKUP, "<i></i>", MARKUP, 3)
    assert Elements("<span class=x>" + html).tags == ["span", "div", "h3", "div", "b", "i", "div"]
    assert "<b>3</b> denoise forwards" in html
    assert "denoise forwards" not in render_side("off")


def test_render_legend_names_the_states_asked_for() -> None:
    assert Elements(render_legend(("given", "fresh"))).texts == [LEGEND["given"], LEGEND["fresh"]]


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.text("ab<>&;\"'/!-{}$`\\é漢", min_size=1, max_size=6)), min_size=1),
    step=st.integers(0, 5),
    block_size=st.sampled_from([None, 1, 3, 8]),
)
def test_render_text_shows_every_known_token_verbatim(
    rows: list[tuple[int, str]], step: int, block_size: int | None
) -> None:
    tokens = [text for _, text in rows]
    timeline = timeline_of([at for at, _ in rows], tokens)
    shown = Elements(render_text(timeline, step, block_size))
    assert set(shown.tags) <= {"div", "span", "br"}
    assert shown.texts == [
        token if known <= step else MASK
        for token, known in zip(tokens[: len(shown.texts)], timeline.known_after, strict=False)
    ]
    hidden = timeline.known_after[len(shown.texts) :]
    assert not hidden or MASK in shown.texts  # what is left out lies behind the block at work
    assert set(shown.classes) <= {f"token {name}" for name in LEGEND}


@settings(max_examples=40)
@given(
    size=st.sampled_from([4, 6, 9]),
    step=st.integers(0, 4),
    token=st.sampled_from(["1", "_", MARKUP]),
    seed=st.randoms(use_true_random=False),
)
def test_render_board_has_one_cell_per_position(size: int, step: int, token: str, seed: object) -> None:
    cells = BoardShape.of_size(size).cells
    revealed_at = [seed.randint(0, 4) for _ in range(cells)]  # type: ignore[attr-defined]
    html = render_board(timeline_of(revealed_at, [token] * cells), step)
    assert Elements(html).texts == [token if at <= step else "" for at in revealed_at]
    assert len(re.findall("<td", html)) == cells
    assert unescape(html).count("fresh") == (revealed_at.count(step) if step else 0)
