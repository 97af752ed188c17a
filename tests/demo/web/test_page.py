"""The page without a browser: its interface for programs, what it serves, and the command that opens it."""

import re
import urllib.request
from pathlib import Path

import gradio as gr
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from transformers import PreTrainedTokenizerFast

from relay_hf import RelayForMaskedDiffusion
from relay_hf.cli import main
from relay_hf.demo.web.page import NO_CHANNEL, build_page, launch_page
from relay_hf.demo.web.runs import Runner

from ...extensions.policy import LeadingRun  # noqa: F401  (registers "leading_run")
from .conftest import QUESTION, free_port, make_model


def test_board_page_fills_both_boards(pages: dict[str, str]) -> None:
    steps = Client(pages["board"], verbose=False).submit(QUESTION, 0.4, api_name="/run")
    slider, on, off = steps.result(timeout=60)
    frames = steps.outputs()
    assert len(frames) == slider["maximum"] + 1
    assert [frame[0]["value"] for frame in frames] == list(range(len(frames)))
    for side in (on, off):
        assert side.count("<td") == 16
        assert 'class="masked' not in side
        assert re.search(r"(solved|not a legal board) after (\d+) denoise forwards", side)
        forwards = re.search(r"<b>(\d+)</b>", side)[1]
        assert f"after {forwards} denoise" in side
    assert frames[0][1].count('class="masked') == QUESTION.count(".")
    assert 'class="fresh' in frames[1][1]


def test_board_page_shows_the_puzzle_before_it_is_run(board_model, board_tokenizer) -> None:
    page = build_page(Runner(board_model, board_tokenizer), "board")
    puzzle, on, off = (
        next(block for block in page.blocks.values() if block.elem_id == name)
        for name in ("puzzle", "relay-on", "relay-off")
    )
    for side in (on, off):
        assert side.value.count("<td") == 16
        assert side.value.count('class="masked') == puzzle.value.count(".")
        assert "not run yet" in side.value
    (draw,) = [event.fn for event in page.fns.values() if event.targets == [(puzzle._id, "change")]]
    assert draw(QUESTION)[0].count('class="masked') == QUESTION.count(".")
    assert draw("12") == ["", ""]


def test_text_page_writes_block_by_block(pages: dict[str, str]) -> None:
    steps = Client(pages["text"], verbose=False).submit("Hi", 16, 0.3, api_name="/run")
    _, on, off = steps.result(timeout=60)
    frames = steps.outputs()
    prompt = len("user: Hi\nassistant: ")
    assert frames[0][1].count("[MASK]") == 24 - prompt  # the rest of the prompt's last block of eight
    assert sum("token free" in frame[1] for frame in frames) == 2  # the first token of either block behind it
    for side in (on, off):
        assert "[MASK]" not in side
        assert side.count('<span class="token') == prompt + 16
        assert re.search(r"whole run: \d+ denoise, [1-9]\d* commit, 1 prefill forwards", side)


def test_page_says_what_is_wrong_with_the_input(pages: dict[str, str]) -> None:
    with pytest.raises(AppError, match="not square"):
        Client(pages["board"], verbose=False).predict("12", 0.4, api_name="/run")


def test_model_without_channel_is_explained(board_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(board_tokenizer, block_size=None, relay_channel="none")
    page = build_page(Runner(model, board_tokenizer), "none")
    run = next(event.fn for event in page.fns.values() if event.api_name == "run")
    *_, last = run(QUESTION, 1.0)
    assert NO_CHANNEL in last[2]
    assert "<td" not in last[2]
    assert "<td" in last[3]


@pytest.mark.parametrize(
    "policy",
    ["confidence_threshold", "confidence_budget", "fixed_count", "entropy_bound", "time_schedule", "leading_run"],
)
def test_threshold_slider_starts_at_the_models_own(
    text_model: RelayForMaskedDiffusion,
    text_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
) -> None:
    monkeypatch.setattr(text_model.generation_config, "unmasking_policy", policy)
    monkeypatch.setattr(text_model.generation_config, "unmasking_threshold", 1)
    page = build_page(Runner(text_model, text_tokenizer), "text")
    (slider,) = [block for block in page.blocks.values() if block.elem_id == "threshold"]
    assert slider.minimum <= slider.value == 1 <= slider.maximum
    assert slider.label == f"threshold of {policy}"
    assert slider.info.startswith("Reveals ")
    assert slider.interactive is (policy != "time_schedule")  # which has none


def test_served_page_names_no_other_host_to_load_from(pages: dict[str, str]) -> None:
    """Links for previews in `meta` are not loaded; the browser test sees what is."""
    with urllib.request.urlopen(pages["board"]) as answer:
        html = answer.read().decode()
    loading = re.findall(r"<(?:script|link|img|iframe|style)\b[^>]*(?:src|href)=\"(https?:)?//", html)
    assert loading == []
    assert '"analytics_enabled":false' in html.replace(" ", "")
    assert "fonts.googleapis" not in html


def test_launch_page_on_taken_port_raises(pages: dict[str, str], board_model, board_tokenizer) -> None:
    page = build_page(Runner(board_model, board_tokenizer), "second")
    with pytest.raises(OSError, match="port"):
        launch_page(page, "127.0.0.1", int(pages["board"].split(":")[2].strip("/")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--web", "--output-dir", "out", "--size", "4"], "`out/relay-sudoku-4x4` holds no model yet: run `make demo`"),
        (["--web", "--model", "nowhere"], "`nowhere` is not a model"),
        (["--web", "--steps", "3"], "`--steps` is about training, but `--web` trains nothing"),
        (["--web", "--model", "x", "--size", "4"], "`--size` finds the demo's model, but `--model` names one"),
        (["--port", "7000"], "`--port` is for the page: also give `--web`"),
        (["--web", "--port", "0"], "`--port=0` must be between 1 and 65535"),
    ],
)
def test_web_command_bad_options_are_one_sentence(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("relay_hf.commands.demo.run_demo", lambda *args: pytest.fail("training began"))
    assert main(["demo", *options]) == 2
    assert message in capsys.readouterr().err


def test_web_command_without_gradio_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo", "--web", "--model", str(tmp_path)]) == 2
    assert "pip install 'relay-hf[web]'" in capsys.readouterr().err


def test_web_command_serves_the_demos_model(
    board_model: RelayForMaskedDiffusion,
    board_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    folder = tmp_path / "runs" / "demo" / "relay-sudoku-4x4"
    board_model.save_pretrained(folder)
    board_tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    served = []

    def look_once(page: gr.Blocks) -> None:
        """In place of waiting for Ctrl-C."""
        with urllib.request.urlopen(page.local_url) as answer:
            served.append(answer.read().decode())
        page.close(verbose=False)

    monkeypatch.setattr(gr.Blocks, "block_thread", look_once)
    port = free_port()
    assert main(["demo", "--web", "--size", "4", "--port", str(port)]) == 0
    assert f"`runs/demo/relay-sudoku-4x4` at http://127.0.0.1:{port}/ (Ctrl-C" in capsys.readouterr().out
    assert "relay_hf: relay-sudoku-4x4" in served[0]
