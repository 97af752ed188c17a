"""Watching a row being written: the history of `generate`, read step by step, and shown in the terminal.

output = model.generate(**inputs, return_dict_in_generate=True, output_history=True)
show_denoising(output.history, tokenizer.batch_decode(output.sequences[0][:, None]))

`plot_denoising` draws the same as a picture.
"""

import shutil
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ..modeling import RelayGenerateHistory

MASKED, GIVEN, REVEALED = "·", "░", "█"  # the last two show tokens whose text is not known
BOLD_GREEN, CYAN, FAINT, PLAIN = "\033[1;32m", "\033[36m", "\033[2m", "\033[0m"


@dataclass(frozen=True)
class Timeline:
    """One row of a history without its padding: N positions.

    Args:
        revealed_at: N numbers of the denoise forward that revealed the position; 0 if none did.
        known_after: N numbers of denoise forwards after which the position is known: `revealed_at`, except for a token
            that a prefill or commit scored, which is known after the forwards before that.
        confidence: N probabilities; 0 where nothing was chosen.
        given: N times whether the position was given.
        tokens: N texts without control characters, or None.
        forwards: denoise forwards of the row.
    """

    revealed_at: list[int]
    known_after: list[int]
    confidence: list[float]
    given: list[bool]
    tokens: list[str] | None
    forwards: int

    @property
    def free(self) -> list[bool]:
        """N times whether a prefill or commit scored the position at no further cost."""
        return [at == 0 and not given for at, given in zip(self.revealed_at, self.given, strict=True)]


def read_history(
    history: RelayGenerateHistory, tokens: Sequence[str] | None, row: int, skip_prompt: bool = False
) -> Timeline:
    """One row of `history`; the arguments are those of `show_denoising`.

    Raises:
        ValueError: `row` is out of range, or `tokens` has another length than the row.
    """
    rows, length = history.revealed_at.shape
    if not 0 <= row < rows:
        raise ValueError(f"`row={row}` is not in the history: it has {rows} rows, counted from 0.")
    if tokens is not None and len(tokens) != length:
        raise ValueError(
            f"`tokens` has {len(tokens)} texts, but a row has {length} positions, padding included: give one text for "
            "each token of `sequences[row]`."
        )
    revealed_at = history.revealed_at[row].cpu()  # (L,)
    given = history.given[row].cpu()  # (L,)
    shown = revealed_at >= 0
    if skip_prompt and bool((shown & ~given).any()):
        shown &= torch.arange(length) >= int((shown & ~given).long().argmax())
    positions = shown.nonzero()[:, 0].tolist()
    at = revealed_at[shown].tolist()
    is_given = given[shown].tolist()
    # A commit comes after all forwards of the blocks before it.
    before = list(accumulate(at, max, initial=0))
    return Timeline(
        revealed_at=at,
        known_after=[k or (0 if g else b) for k, g, b in zip(at, is_given, before, strict=False)],
        confidence=history.confidence[row].cpu()[shown].tolist(),
        given=is_given,
        tokens=None if tokens is None else [_printable(tokens[position]) for position in positions],
        forwards=int(history.denoise_forwards[row]),
    )


def show_denoising(
    history: RelayGenerateHistory, tokens: Sequence[str] | None = None, *, row: int = 0, skip_prompt: bool = False
) -> None:
    """Prints one line per denoise forward: what is known after it, and a dot for every character still masked.

    A line that does not fit the terminal is cut to the part in which something was revealed (a line per part, if there
    are several). In a terminal, and only there, what is new is bold green if the forward revealed it and cyan if the
    prefill or commit behind the forward scored it at no further cost; "3+1" counts the two. A forward with 0 new tokens
    revealed some behind the row's end only.

    Args:
        history: the history of `generate(..., return_dict_in_generate=True, output_history=True)`.
        tokens: L texts, one for each token of `sequences[row]`, for instance
            `tokenizer.batch_decode(sequences[row][:, None])`. Without them positions are blocks, paler if given.
        row: index into the rows of the batch.
        skip_prompt: begin at the first position that was not given.

    Raises:
        ValueError: `row` is out of range, or `tokens` has another length than the row.
    """
    timeline = read_history(history, tokens, row, skip_prompt)
    in_terminal = sys.stdout.isatty()
    columns = shutil.get_terminal_size().columns if in_terminal else None
    for line in denoising_lines(timeline, columns, coloured=in_terminal):
        print(line)


def denoising_lines(timeline: Timeline, columns: int | None, coloured: bool) -> list[str]:
    """The lines of `show_denoising`: a head, the start, and the denoise forwards.

    Args:
        columns: width of the terminal; None = lines of any length.
        coloured: emphasise what is new by escape sequences.
    """
    prefix = max(len(str(timeline.forwards)), len("step"))
    widths = [_width(token) for token in timeline.tokens] if timeline.tokens else [1] * len(timeline.given)
    # Room for the step, what is new (as in "32+1"), and the spaces around them.
    parts = _cut(widths, None if columns is None else max(columns - prefix - 9, 1))
    lines = [f"{'step':>{prefix}}  {'new':>5}  text"]
    for step in range(timeline.forwards + 1):
        revealed = timeline.revealed_at.count(step) if step else 0
        free = sum(
            is_free and known == step for is_free, known in zip(timeline.free, timeline.known_after, strict=True)
        )
        new = (str(revealed) if step else "") + (f"+{free}" if free else "")
        fresh = {i for i, known in enumerate(timeline.known_after) if known == step and not timeline.given[i]}
        touched = [part for part in parts if fresh & set(part)] or parts[:1]
        for index, part in enumerate(touched):
            text = "".join(_cell(timeline, i, step, widths[i], coloured) for i in part)
            head = f"{step:>{prefix}}  {new:>5}" if index == 0 else " " * (prefix + 7)
            lines.append(f"{head}  {text}")
    return lines


def _cell(timeline: Timeline, position: int, step: int, width: int, coloured: bool) -> str:
    """The text of a position after `step` denoise forwards, `width` columns wide."""
    known = timeline.known_after[position]
    if known > step:
        return FAINT + MASKED * width + PLAIN if coloured else MASKED * width
    given = timeline.given[position]
    text = timeline.tokens[position] if timeline.tokens else (GIVEN if given else REVEALED)
    if not coloured or given or known < step:
        return text
    return f"{CYAN if timeline.free[position] else BOLD_GREEN}{text}{PLAIN}"


def _cut(widths: Sequence[int], columns: int | None) -> list[range]:
    """Consecutive parts of the positions, each at most `columns` wide (or one position, if that is wider)."""
    begins, used = [0], 0
    for position, width in enumerate(widths):
        if columns is not None and used and used + width > columns:
            begins.append(position)
            used = 0
        used += width
    return [range(begin, end) for begin, end in zip(begins, [*begins[1:], len(widths)], strict=True)]


def _printable(token: str) -> str:
    """The token on one line: generated text may hold line breaks and escape sequences."""
    named = {"\n": "↵", "\t": "⇥"}
    return "".join(c if c.isprintable() else named.get(c, "�") for c in token) or "∅"


def _width(token: str) -> int:
    """Columns of a terminal that the token takes."""
    wide = [0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in token]
    return max(sum(wide), 1)
