"""A run as HTML, as it stood after any of its denoise forwards.

Pure functions of a `Timeline`. Every text is escaped: a model may write markup, and a user may type it.
"""

from html import escape

from ...pictures.timeline import Timeline
from ...tasks.sudoku import BoardShape

MASK = "[MASK]"
# What happened to a position, as the legend names it; also the CSS class.
LEGEND = {
    "given": "given",
    "fresh": "revealed by this denoise forward",
    "free": "scored by a prefill or commit",
    "known": "revealed before",
    "masked": "masked",
}
STYLE = """
.relay-side h3 { margin: 0 0 .4em; }
.relay-count b { font-size: 1.6em; }
.relay-board { border-collapse: collapse; border: 2px solid #555; margin: .5em 0; }
.relay-board td { width: 2.2em; height: 2.2em; padding: 0; text-align: center; font-size: 1.1em;
                  border: 1px solid #bbb; }
.relay-board td.box-right { border-right: 2px solid #555; }
.relay-board td.box-bottom { border-bottom: 2px solid #555; }
.relay-text { font-family: monospace; overflow-wrap: anywhere; line-height: 1.7; margin: .5em 0; }
.relay-text .token { white-space: pre-wrap; border-radius: 3px; }
.relay-side .given, .relay-legend .given { background: #e4e4e4; color: #222; font-weight: 600; }
.relay-side .fresh, .relay-legend .fresh { background: #ffd27f; color: #111; font-weight: 700; }
.relay-side .free, .relay-legend .free { background: #a9dcf5; color: #111; font-weight: 700; }
.relay-side .masked, .relay-legend .masked { color: #999; font-weight: 400; }
.relay-legend span { padding: .1em .5em; margin-right: .5em; border: 1px solid #bbb; border-radius: 3px; }
"""


def render_legend(names: tuple[str, ...]) -> str:
    """What the colours mean, of those states that can occur."""
    spans = "".join(f'<span class="{name}">{escape(LEGEND[name])}</span>' for name in names)
    return f'<div class="relay-legend">{spans}</div>'


def state_of(timeline: Timeline, position: int, step: int) -> str:
    """A key of `LEGEND`: what a position is after `step` denoise forwards."""
    if timeline.given[position]:
        return "given"
    if timeline.known_after[position] > step:
        return "masked"
    if timeline.known_after[position] < step:
        return "known"
    return "free" if timeline.free[position] else "fresh"


def render_board(timeline: Timeline, step: int) -> str:
    """The Sudoku board after `step` denoise forwards.

    Args:
        timeline: timeline of all cells, with their texts.
        step: 0 = the puzzle.

    Raises:
        ValueError: the number of positions is not the number of a board's cells.
    """
    shape = BoardShape.of_cells(len(timeline.given))
    rows = []
    for row in range(shape.size):
        cells = "".join(_cell(timeline, row * shape.size + column, step, shape) for column in range(shape.size))
        rows.append(f"<tr>{cells}</tr>")
    return f'<table class="relay-board">{"".join(rows)}</table>'


def render_text(timeline: Timeline, step: int, block_size: int | None) -> str:
    """The text after `step` denoise forwards, up to the end of the block that the next forward works on.

    Args:
        timeline: timeline of all positions from the beginning of the prompt, with their texts.
        step: 0 = the prompt.
        block_size: positions of a block, None = the whole text is one.
    """
    masked = [position for position in range(len(timeline.given)) if state_of(timeline, position, step) == "masked"]
    end = len(timeline.given)
    if masked and block_size is not None:
        end = min(end, (masked[0] // block_size + 1) * block_size)
    spans = "".join(_token(timeline, position, step) for position in range(end))
    return f'<div class="relay-text">{spans}</div>'


def render_side(title: str, body: str = "", note: str = "", forwards: int | None = None) -> str:
    """One of the two sides of the page.

    Args:
        title, note: plain text.
        body: HTML.
        forwards: denoise forwards so far, drawn large.
    """
    count = "" if forwards is None else f'<div class="relay-count"><b>{forwards}</b> denoise forwards</div>'
    below = f'<div class="relay-note">{escape(note)}</div>'
    return f'<div class="relay-side"><h3>{escape(title)}</h3>{count}{body}{below}</div>'


def _cell(timeline: Timeline, position: int, step: int, shape: BoardShape) -> str:
    row, column = divmod(position, shape.size)
    state = state_of(timeline, position, step)
    classes = [state]
    if (column + 1) % shape.box_width == 0:
        classes.append("box-right")
    if (row + 1) % shape.box_height == 0:
        classes.append("box-bottom")
    text = "" if state == "masked" else escape(timeline.tokens[position])
    return f'<td class="{" ".join(classes)}"{_hint(timeline, position, state)}>{text}</td>'


def _token(timeline: Timeline, position: int, step: int) -> str:
    state = state_of(timeline, position, step)
    text = escape(MASK if state == "masked" else timeline.tokens[position])
    # The sign for a line break is drawn, and the line broken.
    return f'<span class="token {state}"{_hint(timeline, position, state)}>{text.replace("↵", "↵<br>")}</span>'


def _hint(timeline: Timeline, position: int, state: str) -> str:
    """What is shown when the pointer rests on a token that the model wrote."""
    if state in ("given", "masked"):
        return ""
    by = f"denoise forward {timeline.revealed_at[position]}" if timeline.revealed_at[position] else LEGEND["free"]
    return f' title="{by}, probability {timeline.confidence[position]:.2f}"'
