import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from relay_hf.cli import COMMANDS, main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "5"], "`--size=5` is no size of a board: give 4, 6 or 9"),
        (["--steps", "0"], "`--steps=0` must be at least 1"),
        (["--hidden-size", "40"], "`--hidden_size=40` must be a multiple of 32"),
    ],
)
def test_demo_bad_argument_is_one_sentence_and_exit_code_2(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    small = ["--warmup-steps", "1", "--puzzles", "10", "--test-puzzles", "2", "--output-dir", str(tmp_path / "out")]
    assert main(["demo", *small, *options]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("relay-hf: error: ")
    assert message in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--output-dir", "{file}/out"], "Not a directory"), (["--dataset", "nobody/nothing"], "nobody/nothing")],
)
def test_demo_unusable_folder_or_data_is_told_before_training(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay_hf.demo.study.train_model", lambda *args, **kwargs: pytest.fail("training began"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    options = [option.format(file=tmp_path / "file") for option in options]
    assert main(["demo", "--size", "4", "--puzzles", "10", "--test-puzzles", "2", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["convert", "a", "b", "--block-sice", "4"], "block_size"),
        (["serve", "a", "--hots", "b"], "host"),
        (["push", "a", "b/c", "--privat=true", "--revison", "x"], "revision"),
        (["eval", "a", "--limti", "3"], "limit"),
        (["compare", "a", "b", "--pictrue", "c"], "picture"),
        (["demo", "--stps", "3"], "steps"),
    ],
)
def test_misspelt_option_is_refused_with_the_likely_one(
    argv: list[str], option: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(argv) == 2
    assert f"is not an option of `relay-hf {argv[0]}`: did you mean `{option}`?" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]])
def test_closed_pipe_ends_without_a_word(argv: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    script = Path(sys.executable).with_name("relay-hf")
    # Unbuffered, argparse would keep the error to itself.
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    ended = subprocess.run(
        [script, *argv], stdout=writing, stderr=subprocess.PIPE, text=True, check=False, env=environment
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_interrupted_command_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("relay_hf.commands.compare.run", interrupt)
    assert main(["compare"]) == 130
    assert capsys.readouterr().err == "relay-hf: interrupted\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_colours_go_to_terminals_only(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def complain(*_: object) -> None:
        logging.StreamHandler().handle(logging.makeLogRecord({"msg": "\033[1mREPORT\033[0m: \033[38;5;208mlost\033[m"}))
        raise ValueError("\033[31mwrong\033[0m")

    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr("relay_hf.commands.compare.run", complain)
    assert main(["compare"]) == 2
    printed = capsys.readouterr().err
    assert ("\033" in printed) == is_terminal
    assert is_terminal or printed == "REPORT: lost\nrelay-hf: error: wrong\n"


def test_unknown_command_exits_with_usage(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fly"])
    assert stopped.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_console_script_help_lists_the_demo() -> None:
    script = Path(sys.executable).with_name("relay-hf")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    shown = subprocess.run([script, "demo", "--help"], capture_output=True, text=True, check=True, env=environment)
    assert "--warmup_steps N" in shown.stdout


def test_command_line_does_not_wait_for_what_only_the_demo_needs() -> None:
    code = "import sys, relay_hf.cli; print([name for name in ('trl', 'peft', 'datasets') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_help_shows_every_option_once_and_defaults_that_say_something(
    command: str, capsys: pytest.CaptureFixture
) -> None:
    """`_format_action_invocation` is private to argparse: should it move, options would show twice."""
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert shown.startswith(f"usage: relay-hf {command}")
    assert not re.findall(r"--\w+-\w+ [A-Z]+$", shown, re.MULTILINE)
    assert "None" not in shown
    if command == "eval":
        assert "--max_new_tokens N    Longest answer. [2048]" in shown


def test_options_are_understood_in_both_spellings(capsys: pytest.CaptureFixture) -> None:
    for option in ("--max_new_tokens", "--max-new-tokens"):
        assert main(["eval", "nothing", option, "0"]) == 2
        assert "`--max_new_tokens=0` must be at least 1" in capsys.readouterr().err
