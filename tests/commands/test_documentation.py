"""docs/command_line.md names commands, options and recipes that exist."""

import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from relay_hf.cli import COMMANDS
from relay_hf.commands.chat import ChatArguments
from relay_hf.commands.generate import GenerateArguments
from relay_hf.commands.prepare_data import PrepareArguments
from relay_hf.commands.traces import TracesArguments
from relay_hf.commands.train_arguments import ARGUMENTS
from relay_hf.recipes import recipe_path

PAGE = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text()
OTHERS = {"config", "help", "help_all", "num_processes", "module", "json", "raw", "show_steps"}


def test_page_names_options_that_exist() -> None:
    sources = (*ARGUMENTS, GenerateArguments, ChatArguments, PrepareArguments, TracesArguments)
    known = {option.name for source in sources for option in fields(source)} | OTHERS
    assert set(re.findall(r"--(\w+)", PAGE)) <= known


def test_page_names_every_command_and_no_other() -> None:
    table = PAGE[: PAGE.index("\n## ")]
    assert set(re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))) == set(COMMANDS)
    assert set(re.findall(r"^relay-hf ([\w-]+)", PAGE, re.MULTILINE)) <= set(COMMANDS)


def test_page_names_every_recipe() -> None:
    assert {path.stem for path in recipe_path().glob("*.yaml")} <= set(
        re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    )


def test_recipe_of_the_page_has_only_options_that_exist() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert yaml.safe_load(text).keys() <= {option.name for source in ARGUMENTS for option in fields(source)}


def test_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["relay_hf", "train", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("relay_hf", run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: relay-hf train")
