"""What is imported at the start: nobody waits for torch to read a list of options, or that an option is misspelt."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from relay_hf import RelayForMaskedDiffusion
from relay_hf.cli import COMMANDS

# What the options of TRL's trainer need, and so `trl sft --help`.
OF_TRL_OPTIONS = {
    "torch", "transformers", "numpy", "huggingface_hub", "safetensors", "tokenizers", "accelerate", "peft", "PIL",
}  # fmt: skip
HEAVY = OF_TRL_OPTIONS | {
    "datasets", "pandas", "pyarrow", "matplotlib", "fastapi", "uvicorn", "openai", "gradio", "lm_eval",
}  # fmt: skip
SCRIPT = str(Path(sys.executable).with_name("relay-hf"))
POSITIONALS = {"convert": ["a", "b"], "push": ["a", "b/c"], "compare": ["a", "b"], "card": ["a", "b"], "demo": []}


def imported(*argv: str) -> tuple[set[str], str]:
    """The packages that a Python process imports, and what it prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *argv], capture_output=True, text=True, env=environment, check=False
    )
    lines = done.stderr.splitlines()
    names = [line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")]
    printed = [line for line in lines if not line.startswith("import time:")]
    return {name.split(".")[0] for name in names}, "\n".join([done.stdout, *printed])


@pytest.mark.parametrize("program", [["-m", "relay_hf"], [SCRIPT]])
@pytest.mark.parametrize("option", ["--version", "--help", "fly"])
def test_program_alone_imports_no_library(program: list[str], option: str) -> None:
    packages, printed = imported(*program, option)
    assert printed.strip()
    assert "argparse" in packages
    assert not packages & {*HEAVY, "trl", "yaml"}


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_command_help_and_refusals_import_a_parser_only(command: str) -> None:
    packages, printed = imported("-m", "relay_hf", command, "--help")
    assert f"usage: relay-hf {command}" in printed
    assert not packages & HEAVY
    packages, printed = imported("-m", "relay_hf", command, *POSITIONALS.get(command, ["a"]), "--optoin", "3")
    assert f"`--optoin` is not an option of `relay-hf {command}`" in printed
    assert not packages & HEAVY


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "a", "b", "--max_new_tokens", "many"],
        ["chat", "a", "--max_new_tokens", "0"],
        ["eval", "a", "--generation_options", "{"],
        ["serve", "a", "--port", "70000"],
        ["convert", "a", "b", "--block-size", "-1"],
        ["demo", "--size", "5"],
        ["push", "a", "b/c", "--private", "perhaps"],
    ],
    ids=lambda argv: argv[0],
)
def test_refused_value_imports_a_parser_only(argv: list[str]) -> None:
    packages, printed = imported("-m", "relay_hf", *argv)
    assert argv[-1] in printed
    assert not packages & HEAVY


def test_train_options_import_what_the_options_of_trl_need() -> None:
    code = "from relay_hf.cli import main; main(['train', '--help']); main(['train', '--optoin', '3'])"
    packages, printed = imported("-c", code)
    assert "--learning_rate" in printed
    assert "`--optoin` is not an option of `relay-hf train`" in printed
    assert packages & HEAVY <= OF_TRL_OPTIONS


def test_import_relay_hf_imports_less_than_transformers() -> None:
    ours, _ = imported("-c", "import relay_hf")
    theirs, _ = imported("-c", "import transformers")
    assert "relay_hf" in ours
    assert not ours & HEAVY
    assert "numpy" in theirs  # else this test could see nothing


@pytest.mark.parametrize(
    "imports",
    [
        "import importlib.util, relay_hf; importlib.util.find_spec('transformers'); from transformers import {auto}",
        "from transformers import {auto}; import relay_hf",
        "import relay_hf.modeling; from transformers import {auto}",
    ],
    ids=["before", "after", "model"],
)
def test_auto_class_loads_relay_model_wherever_relay_hf_is_imported(
    imports: str, make_model: Callable[..., RelayForMaskedDiffusion], tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path)
    code = f"{imports}; print(type({{auto}}.from_pretrained({str(tmp_path)!r})).__name__)".format(auto="AutoModel")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "RelayForMaskedDiffusion\n"
