"""The snippets, commands and links of README and docs work as they stand.

What would come from the Hub is replaced by tiny random models and local rows, and trainings are cut to two steps. A
page's Python snippets run one after the other, in one namespace and in an empty folder.
"""

import contextlib
import pydoc
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import openai
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from lm_eval.__main__ import HarnessCLI
from starlette.testclient import TestClient
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from trl import TrlParser

import relay_hf
from relay_hf import RelayConfig, RelayForMaskedDiffusion, RelayTrainerConfig
from relay_hf.cli import COMMANDS, main
from relay_hf.modeling.channel_relay import CHANNELS
from relay_hf.modeling.unmasking_relay import POLICIES
from relay_hf.serving.server import RelayHandler, build_app
from relay_hf.testing import CHAT_TEMPLATE, all_tokens_but, byte_tokenizer
from relay_hf.trainers.objectives import RECIPES

from . import pages
from .conftest import REFERENCE
from .pages import NOT_RUN, PAGES, README, ROOT

WITH_PYTHON = [page for page in PAGES if pages.python_snippets(page)]
RELAY_MODELS = ("my-relay", "you/my-relay")  # that pages load
ROWS = [{"prompt": "1 + 1 = ", "completion": "2"}, {"prompt": "two and two are ", "completion": "four"}] * 8


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pages name: a causal decoder, a relay model and a checkpoint in the published layout."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    backbone = Qwen2Config(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    base = folder / "Qwen" / "Qwen2.5-0.5B"
    Qwen2ForCausalLM(backbone).bfloat16().save_pretrained(base)  # as most published checkpoints are
    tokenizer.save_pretrained(base)
    _save_plain_decoder(folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    config = RelayConfig(text_config=backbone, block_size=8, mask_token_id=tokenizer.mask_token_id, token_shift=True)
    model = RelayForMaskedDiffusion(config)
    # It writes a few letters and soon a stop token, and takes few steps.
    suppressed = {*all_tokens_but(tokenizer, "abcdefgh"), *range(len(tokenizer), 300)} - {tokenizer.eos_token_id}
    model.generation_config.suppress_tokens = sorted(suppressed)
    model.generation_config.unmasking_threshold = 0.0
    for name in RELAY_MODELS:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    shutil.copytree(REFERENCE / "checkpoint", folder / "published-relay")
    return folder


def _save_plain_decoder(folder: Path) -> None:
    """As transformers writes it: no [MASK], and no row of the embeddings without a token."""
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE, mask_token=None)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def registries() -> Iterator[None]:
    """What a page registers is gone with it."""
    before = [(registry, dict(registry)) for registry in (CHANNELS, POLICIES, RECIPES)]
    yield
    for registry, names in before:
        registry.clear()
        registry.update(names)


@pytest.fixture
def run_page(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None
) -> Iterator[Callable[[Path], dict[str, Any]]]:
    """Runs the Python snippets of a page; returns what they left in their namespace."""
    rows = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    plain_init = RelayTrainerConfig.__init__

    def short(self: RelayTrainerConfig, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **{**kwargs, "max_steps": 2, "use_cpu": True, "report_to": []})

    monkeypatch.setattr(RelayTrainerConfig, "__init__", short)
    if "push" in relay_hf.__all__:
        monkeypatch.setattr(relay_hf, "push", _push)
    monkeypatch.chdir(tmp_path)

    def run(page: Path) -> dict[str, Any]:
        text = page.read_text(encoding="utf-8")
        shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
        if 'RelayTrainerConfig("my-relay"' in text:
            shutil.rmtree(tmp_path / "my-relay")  # the page makes it
        if "OpenAI(" in text:
            _serve("my-relay", monkeypatch)
        names: dict[str, Any] = {}
        for snippet in pages.python_snippets(page):
            # Errors point to the page.
            code = compile("\n" * (snippet.line - 1) + snippet.code, str(page), "exec")
            if not snippet.code.startswith(NOT_RUN):
                exec(code, names)
        return names

    return run


def _push(source: Any, repo_id: str, **_: Any) -> None:
    """The working folder is the Hub."""
    if isinstance(source, str):
        shutil.copytree(source, repo_id, dirs_exist_ok=True)
    else:
        source.save_pretrained(repo_id)


def _serve(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients reach a server in this process, whatever address they were given; its answers are cut short."""
    server, client = TestClient(build_app(model, device="cpu")), openai.OpenAI
    plain_config = RelayHandler._build_generation_config

    def short_config(*args: Any, **kwargs: Any) -> GenerationConfig:
        config = plain_config(*args, **kwargs)
        config.max_new_tokens = min(config.max_new_tokens, 32)
        return config

    monkeypatch.setattr(RelayHandler, "_build_generation_config", short_config)
    monkeypatch.setattr(openai, "OpenAI", lambda **options: client(**options, http_client=server))


# -- Python ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if page != README], ids=pages.name_of)
def test_page_python_runs_from_top_to_bottom(page: Path, run_page: Callable) -> None:
    run_page(page)


def test_readme_ten_lines_load_train_and_generate(run_page: Callable, capsys: pytest.CaptureFixture) -> None:
    names = run_page(README)
    assert {p.dtype for p in names["trainer"].model.parameters()} == {torch.float32}
    assert re.search(r"tensor\(\[\d+\]\)", capsys.readouterr().out)
    assert Path("my-relay", "model.safetensors").exists()
    assert names["model"].config.mask_token_id == names["tokenizer"].mask_token_id == 258  # a new row, the last


def test_pages_few_snippets_are_not_run() -> None:
    skipped = [s for page in WITH_PYTHON for s in pages.python_snippets(page) if s.code.startswith(NOT_RUN)]
    assert len(skipped) <= 3


# -- commands --------------------------------------------------------------------------------------------------------


class ParsedError(Exception):
    """The arguments of a command were taken."""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[list[str], bool], None]:
    """Asserts that a command exists and knows its options; a `whole` one must also have all that it needs."""
    parse = TrlParser.parse_args_into_dataclasses

    def parse_only(*args: Any, **kwargs: Any) -> None:
        parse(*args, **kwargs)
        raise ParsedError

    def help_of(*arguments: str) -> str:
        with contextlib.suppress(SystemExit):
            main([*arguments, "--help"])
        return capsys.readouterr().out

    def check_relay_hf(words: list[str], whole: bool) -> None:
        if words[0] in ("COMMAND", "--help", "--version"):
            return
        assert words[0] in COMMANDS, words
        module = __import__(f"relay_hf.commands.{words[0].replace('-', '_')}", fromlist=["run"])
        if whole and hasattr(module, "make_parser") and "--help" not in words:
            with monkeypatch.context() as patch:
                patch.setattr(TrlParser, "parse_args_into_dataclasses", parse_only)
                with pytest.raises(ParsedError):
                    main(words)
            return
        known = help_of(words[0])
        if "--help_all" in known:
            known += help_of(words[0], "--help_all")
        for option in options_of(words):
            assert option.replace("-", "_") in known.replace("-", "_"), (words, option)

    def check_make(words: list[str], whole: bool) -> None:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[0]}:", makefile, flags=re.MULTILINE), words
        for name, _, value in (word.partition("=") for word in words[1:]):
            assert (words[0], name) == ("demo", "DEMO"), words
            check_relay_hf(["demo", *value.split()], whole)

    def check_python(words: list[str], whole: bool) -> None:
        if words[:2] == ["-m", "relay_hf.evaluation"]:
            if whole:
                with monkeypatch.context() as patch:
                    patch.setattr(sys, "argv", ["lm_eval", *words[2:]])
                    HarnessCLI().parse_args()
            return
        if words[:2] == ["-m", "pytest"]:
            assert (ROOT / words[2]).exists(), words
            return
        if words[:2] == ["-m", "relay_hf"]:
            check_relay_hf(words[2:] or ["--help"], whole)
            return
        path = f"{words[1].replace('.', '/')}.py" if words[0] == "-m" else words[0]
        assert path.split("/")[0] in ("examples", "benchmarks", "relay_hf"), words
        source = (ROOT / path).read_text(encoding="utf-8")
        for option in options_of(words):
            assert f'"{option}"' in source, (words, option)

    def check_pip(words: list[str], whole: bool) -> None:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert words[0] == "install"
        named = re.fullmatch(r"(?:relay-hf|\.)(?:\[([\w,-]+)\])?", words[-1])
        assert named, words
        assert set((named[1] or "").split(",")) - {""} <= extras.keys(), words

    def check_accelerate(words: list[str], whole: bool) -> None:
        assert words[0] == "launch", words
        given = launch_command_parser().parse_args(words[1:])
        assert given.config_file is None or (ROOT / given.config_file).is_file(), words
        if given.module:
            assert given.training_script == "relay_hf", words
            check_relay_hf(given.training_script_args, whole)

    checks = {
        "relay-hf": check_relay_hf, "make": check_make, "python": check_python, "pip": check_pip,
        "accelerate": check_accelerate,
    }  # fmt: skip
    return lambda words, whole: checks[words[0]](words[1:], whole)


def options_of(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


@pytest.mark.parametrize("page", PAGES, ids=pages.name_of)
def test_page_commands_exist_and_know_their_options(page: Path, check: Callable) -> None:
    for words in pages.fenced_commands(page):
        check(words, True)
    for words in pages.inline_commands(page):
        check(words, False)


@pytest.mark.parametrize(
    "command",
    ["relay-hf fly", "relay-hf eval model --treshold 1", "relay-hf convert source", "make tea", "make demo DEMO=--fool",
     "python examples/train_text.py --laura", "python -m relay_hf.evaluation --modle relay", "pip install relay-hf[x]"],
)  # fmt: skip
def test_wrong_command_is_noticed(command: str, check: Callable) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError, pytest.fail.Exception)):
        check(command.split(), True)


# -- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=pages.name_of)
def test_page_links_pictures_and_anchors_exist(page: Path) -> None:
    for path, anchor in pages.links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert ROOT in target.parents, path
        if anchor:
            assert anchor in pages.anchors(target), f"{path}#{anchor}"


def test_readme_and_start_page_link_something() -> None:
    assert pages.links(README)
    assert pages.links(ROOT / "docs" / "index.md")


def test_names_of_the_api_pages_exist() -> None:
    """`make docs` would notice as well, but is no test."""
    lines = "\n".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    names = re.findall(r"^::: (\S+)", lines, flags=re.M)
    assert len(names) > 50
    assert [name for name in names if pydoc.locate(name) is None] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in sorted((ROOT / "docs").glob("*.md")) if f": {page.name}\n" not in navigation] == []


def test_tests_that_the_makefile_names_exist() -> None:
    named = re.findall(r"tests/[\w/]+\.py", (ROOT / "Makefile").read_text())
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
