"""A history read step by step, and its terminal view."""

import re
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relay_hf import RelayGenerateHistory, show_denoising
from relay_hf.pictures.timeline import denoising_lines, read_history

from ..conftest import MASK
from ..modeling.decoding import prompt_of, run

EXAMPLES = Path(__file__).parents[2] / "examples"


def make_history(revealed_at: list[int], given: int | list[bool] = 0, forwards: int | None = None):
    """A history of one row; `given` may count the leading positions that were."""
    if isinstance(given, int):
        given = [position < given for position in range(len(revealed_at))]
    at = torch.tensor([revealed_at])
    confidence = (at > 0) * 0.5
    forwards = max(revealed_at) if forwards is None else forwards
    return RelayGenerateHistory(at, confidence, torch.tensor([given]), torch.tensor([forwards]))


# A prompt of two, a free token behind the prefill, three revealed, a free one behind the commit, one revealed, padding.
BLOCKS = make_history([-1, 0, 0, 0, 2, 1, 1, 0, 3, -1], [False, True, True] + [False] * 7)
TEXTS = ["<pad>", "ab", "c", "D", "E", "FF", "G", "H", "I", "<pad>"]
# Five cells, clues at both ends and in the middle.
CANVAS = make_history([0, 2, 0, 1, 0], [True, False, True, False, True])


def printed(capsys: pytest.CaptureFixture, *arguments: object, **options: object) -> list[str]:
    show_denoising(*arguments, **options)
    return capsys.readouterr().out.splitlines()


def test_show_block_model_line_per_forward(capsys: pytest.CaptureFixture) -> None:
    assert printed(capsys, BLOCKS, TEXTS) == [
        "step    new  text",
        "   0     +1  abcD······",
        "   1      2  abcD·FFG··",
        "   2    1+1  abcDEFFGH·",
        "   3      1  abcDEFFGHI",
    ]


def test_show_canvas_line_per_forward(capsys: pytest.CaptureFixture) -> None:
    assert printed(capsys, CANVAS, "12345")[1:] == ["   0         1·3·5", "   1      1  1·345", "   2      1  12345"]


def test_show_without_tokens_blocks_paler_if_given(capsys: pytest.CaptureFixture) -> None:
    assert [line.split()[-1] for line in printed(capsys, CANVAS)[1:]] == ["░·░·░", "░·░█░", "░█░█░"]


def test_show_skip_prompt_begins_at_first_new_position(capsys: pytest.CaptureFixture) -> None:
    assert printed(capsys, BLOCKS, TEXTS, skip_prompt=True)[-1] == "   3      1  DEFFGHI"
    assert printed(capsys, CANVAS, "12345", skip_prompt=True)[-1] == "   2      1  2345"


def test_show_forward_that_revealed_nothing_kept_has_a_line(capsys: pytest.CaptureFixture) -> None:
    lines = printed(capsys, make_history([0, 1], given=1, forwards=3), "ab")
    assert lines[2:] == ["   1      1  ab", "   2      0  ab", "   3      0  ab"]


def test_show_row_without_forwards(capsys: pytest.CaptureFixture) -> None:
    assert printed(capsys, make_history([0, 0], given=1), "ab")[1:] == ["   0     +1  ab"]


def test_show_other_row(capsys: pytest.CaptureFixture) -> None:
    both = RelayGenerateHistory(*(torch.cat([tensor, tensor.flip(-1)]) for tensor in CANVAS.to_tuple()))
    assert printed(capsys, both, "12345", row=1)[2].split()[-1] == "123·5"


def test_show_control_characters_made_visible(capsys: pytest.CaptureFixture) -> None:
    """Line breaks would tear the lines; an escape sequence would be obeyed."""
    lines = printed(capsys, make_history([0, 0, 1, 1], given=2), ["a\n", "\t", "\033[2J", ""])
    assert lines[-1].endswith("a↵⇥�[2J∅")
    assert lines[1].endswith("a↵⇥·····")


def test_show_wide_characters_keep_the_line_in_place(capsys: pytest.CaptureFixture) -> None:
    lines = printed(capsys, make_history([2, 1]), ["日", "x"])
    assert [line[13:] for line in lines[1:]] == ["···", "··x", "日x"]


def test_show_colour_in_a_terminal_only(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = printed(capsys, BLOCKS, TEXTS)
    assert "\033" not in "".join(plain)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    coloured = printed(capsys, BLOCKS, TEXTS)
    assert "\033[1;32mFF\033[0m\033[1;32mG\033[0m" in coloured[2]
    assert "\033[36mH\033[0m" in coloured[3]  # by the commit
    assert [re.sub(r"\033\[[\d;]*m", "", line) for line in coloured] == plain


def test_lines_wider_than_terminal_cut_to_the_parts_that_change() -> None:
    history = make_history([0] * 10 + [1, 2, 2, 3] + [3] * 16 + [4] * 10, given=10)
    lines = denoising_lines(read_history(history, None, 0), columns=13 + 10, coloured=False)
    assert max(map(len, lines)) == 23
    assert [line[:4].strip() for line in lines[1:]] == ["0", "1", "2", "3", "", "4"]  # the third forward has two parts
    assert lines[4:6] == ["   3     17  ██████████", "             ██████████"]


@given(st.data())
def test_lines_of_any_history(data: st.DataObject) -> None:
    """Nothing known is hidden again, every reveal is counted once, and the last line is the text."""
    revealed_at = data.draw(st.lists(st.integers(-1, 6), min_size=1, max_size=30).filter(lambda at: max(at) >= 0))
    given_ = [at == 0 and data.draw(st.booleans()) for at in revealed_at]
    columns = data.draw(st.sampled_from([None, 20, 40]))
    texts = [chr(65 + position) for position in range(len(revealed_at))]
    timeline = read_history(make_history(revealed_at, given_), texts, 0)
    lines = denoising_lines(timeline, columns, coloured=False)[1:]
    assert columns is None or max(map(len, lines)) <= columns
    counted = sum(int(number) for line in lines for number in re.findall(r"\d+", line[4:11]))
    assert counted == sum(at >= 0 for at in revealed_at) - sum(given_)
    if columns is None:
        assert len(lines) == timeline.forwards + 1
        assert lines[-1][13:] == "".join(text for text, at in zip(texts, revealed_at, strict=True) if at >= 0)
        for earlier, later in pairwise(lines):
            assert all(a in ("·", b) for a, b in zip(earlier[13:], later[13:], strict=True))


@pytest.mark.parametrize("block_size", [8, None])
def test_show_history_of_generate(make_model, capsys: pytest.CaptureFixture, block_size: int | None) -> None:
    prompt = prompt_of(5)
    if block_size is None:
        prompt[0, 2] = MASK
    model = make_model(open_channel=True, token_shift=True, block_size=block_size)
    output = run(model, prompt, max_new_tokens=12, output_history=True)
    texts = [chr(0x100 + token) for token in output.sequences[0].tolist()]
    lines = printed(capsys, output.history, texts)
    assert len(lines) == 2 + int(output.denoise_forwards)
    assert lines[-1].endswith("".join(texts))
    assert lines[1].count("·") == 12 + (block_size is None)


@pytest.mark.parametrize("row", [-1, 1])
def test_show_row_that_is_not_there_raises(row: int) -> None:
    with pytest.raises(ValueError, match=f"`row={row}` is not in the history: it has 1 rows"):
        show_denoising(CANVAS, row=row)


def test_show_tokens_of_other_length_raises() -> None:
    with pytest.raises(ValueError, match="`tokens` has 4 texts, but a row has 5 positions"):
        show_denoising(CANVAS, "1234")


def test_example_shows_steps_and_writes_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    picture = tmp_path / "denoising.png"
    monkeypatch.setattr(sys, "argv", ["watch_denoising.py", "--max-new-tokens", "20", "--output", str(picture)])
    runpy.run_path(str(EXAMPLES / "watch_denoising.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    forwards = int(re.match(r"(\d+) denoise forwards for 20 tokens", lines[-2])[1])
    assert len(lines) == 2 + forwards + 2
    assert picture.read_bytes()[:4] == b"\x89PNG"
