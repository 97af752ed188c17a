"""What the page runs: the same as `generate`, with and without the relay, and refusals that say why."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from relay_hf import RelayForMaskedDiffusion
from relay_hf.demo.web.runs import Run, Runner
from relay_hf.loading.checkpoint import load_for_decoding
from relay_hf.pictures.timeline import Timeline
from relay_hf.tasks.sudoku import questions_to_ids

from .conftest import QUESTION, make_model


@pytest.fixture
def boards(board_model: RelayForMaskedDiffusion, board_tokenizer: PreTrainedTokenizerFast) -> Runner:
    return Runner(board_model, board_tokenizer)


@pytest.fixture
def texts(text_model: RelayForMaskedDiffusion, text_tokenizer: PreTrainedTokenizerFast) -> Runner:
    return Runner(text_model, text_tokenizer)


@pytest.mark.parametrize("side", ["on", "off"])
def test_solve_equals_generate(boards: Runner, side: str) -> None:
    runs = boards.solve(QUESTION, 0.4)
    output = boards.model.generate(
        questions_to_ids([QUESTION], boards.tokenizer),
        unmasking_threshold=0.4,
        use_relay=side == "on",
        return_dict_in_generate=True,
    )
    run = getattr(runs, side)
    assert "".join(run.timeline.tokens) == boards.tokenizer.decode(output.sequences[0])
    assert (run.timeline.forwards, run.commits, run.prefills) == (int(output.denoise_forwards[0]), 0, 0)
    assert runs.on.timeline != runs.off.timeline
    assert runs.forwards == max(runs.on.timeline.forwards, runs.off.timeline.forwards)


def test_progress_grows_from_nothing_to_all(boards: Runner, texts: Runner) -> None:
    told: list[float] = []
    texts.write("ab", 24, 0.3, told.append)
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 1.0)
    assert len([done for done in told if 0 < done < 0.5]) >= 2, "blocks of 8 tokens, half of all for each run"
    told.clear()
    boards.solve(QUESTION, 0.4, told.append)
    assert (told[0], told[-1]) == (0.0, 1.0)


def test_solve_reads_spaces_line_breaks_and_zeros(boards: Runner) -> None:
    typed = "\n".join(QUESTION[i : i + 4].replace(".", "0") for i in range(0, 16, 4)) + " "
    assert boards.solve(typed, 0.4) == boards.solve(QUESTION, 0.4)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "not square"),
        ("1" * 2 + "." * 14, "conflict"),
        ("<b>." * 4, "'<'"),
        ("." * 36, "6x6, but this model fills in 4x4 boards: write 16"),
        ("1234341221434321", "no blanks"),
    ],
)
def test_solve_of_no_puzzle_raises(boards: Runner, question: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        boards.solve(question, 0.4)


@pytest.mark.parametrize(
    ("board", "solved"), [("1234341221434321", True), ("1234341221434322", False), ("1234341221434_21", False)]
)
def test_is_solved(board: str, solved: bool) -> None:
    assert Run(Timeline([0] * 16, [0] * 16, [0.0] * 16, [True] * 16, list(board), 0), 0, 0).is_solved is solved


def test_model_without_channel_runs_once(board_tokenizer: PreTrainedTokenizerFast) -> None:
    runs = Runner(make_model(board_tokenizer, block_size=None, relay_channel="none"), board_tokenizer).solve(
        QUESTION, 1
    )
    assert runs.on is None
    assert runs.forwards == runs.off.timeline.forwards > 0


def test_write_answers_in_the_chat_and_counts_all_kinds(texts: Runner) -> None:
    runs = texts.write("Who?", 20, 0.3)
    text = "".join(runs.on.timeline.tokens)
    assert text.startswith("user: Who?↵assistant: ")
    assert len(runs.on.timeline.tokens) == len("user: Who?\nassistant: ") + 20
    assert runs.on.prefills == 1
    assert runs.on.commits > 1
    assert any(runs.on.timeline.free)  # the first token of a block of a token-shift model
    assert runs.on.timeline != runs.off.timeline


def test_write_greedily_and_without_start_where_the_model_says_otherwise(
    texts: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = texts.write("a", 12, 0.3)
    options = texts.model.generation_config
    monkeypatch.setattr(options, "do_sample", True)
    monkeypatch.setattr(options, "t_max", 2.0)
    monkeypatch.setattr(options, "sampling_seeds", [3])
    assert texts.write("a", 12, 0.3) == expected
    monkeypatch.setattr(options, "relay_start", "self")
    started = texts.write("a", 12, 0.3)
    assert started.off == expected.off
    assert started.on != expected.on


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "message"),
    [("", 8, "prompt is empty"), ("a" * 100, 64, "leaves room for 10 more, not for 64")],
)
def test_write_of_what_does_not_fit_raises(texts: Runner, prompt: str, new_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        texts.write(prompt, new_tokens, 0.3)


def test_runner_tells_saved_boards_from_text(boards: Runner, texts: Runner, tmp_path: Path) -> None:
    for name, runner in (("board", boards), ("text", texts)):
        runner.model.save_pretrained(tmp_path / name)
        runner.tokenizer.save_pretrained(tmp_path / name)
    assert Runner(*load_for_decoding(str(tmp_path / "board"))).board_size == 4
    loaded = Runner(*load_for_decoding(str(tmp_path / "text")))
    assert loaded.board_size is None
    assert torch.equal(loaded.model.relay.norm.weight, texts.model.relay.norm.weight)
