"""`DecodingOptions`: the one table of options, which every other place reads."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from transformers import GenerationConfig

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.commands.decoding_arguments import DecodingArguments
from relay_hf.evaluation.harness import GENERATION_OPTIONS
from relay_hf.modeling import DecodingOptions, generation_blocks_relay, generation_options_relay, generation_relay
from relay_hf.modeling.generation_options_relay import GREEDY, default_options, option_names
from relay_hf.serving.request_checks import RESULT_OPTIONS, read_options

from ..conftest import MASK, text_config
from .decoding import prompt_of, run

FIELDS = dataclasses.fields(DecodingOptions)
NAMES = [option.name for option in FIELDS]
PAGE = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text()


def config_of(block_size: int | None, **fields: Any) -> RelayConfig:
    return RelayConfig(text_config=text_config(), mask_token_id=MASK, block_size=block_size, **fields)


# -- the table documents itself ----------------------------------------------------------------------------------------


def test_docstring_explains_every_option_and_no_other() -> None:
    arguments = inspect.getdoc(DecodingOptions).split("Args:\n")[1].split("\n\nRaises:")[0]
    named = re.findall(r"^    (\w[\w, ]*): ", arguments, re.MULTILINE)
    assert [name for names in named for name in names.split(", ")] == NAMES


def test_page_lists_every_option_with_its_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| `(.*?)` \|", PAGE, re.MULTILINE)
    shown = {name: (block.replace('"', "'"), canvas.replace('"', "'")) for name, block, canvas in rows}
    blocks, canvas = default_options(config_of(32)), default_options(config_of(None))
    assert shown == {name: (repr(blocks[name]), repr(canvas[name])) for name in NAMES}


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="unmasking_threshold"):
        DecodingOptions().unmasking_threshold = 0.5  # type: ignore[misc]


# -- its readers -------------------------------------------------------------------------------------------------------


def test_every_option_is_about_one_subject() -> None:
    subjects = ("unmasking", "drawing", "result")
    assert sorted(name for subject in subjects for name in option_names(subject)) == sorted(NAMES)
    assert option_names(*subjects) == tuple(NAMES)


def test_harness_offers_all_about_unmasking() -> None:
    assert option_names("unmasking") == GENERATION_OPTIONS


def test_command_line_offers_all_about_unmasking_in_their_types() -> None:
    offered, types = get_type_hints(DecodingArguments), {option.name: option.type for option in FIELDS}
    assert set(option_names("unmasking")) <= offered.keys()
    for name in offered.keys() & types.keys():
        own = {*(get_args(types[name]) or (types[name],)), type(None)}
        assert set(get_args(offered[name])) <= own, name


def test_command_line_passes_every_option_on() -> None:
    given = {name: 1 for name in option_names("unmasking")}
    arguments = DecodingArguments(max_new_tokens=9, **given)  # type: ignore[arg-type]
    assert arguments.options(GenerationConfig(do_sample=False)) == {**given, "max_new_tokens": 9}


def test_server_takes_all_that_are_not_about_the_result(make_model: Callable) -> None:
    defaults = make_model().generation_config
    assert RESULT_OPTIONS & set(NAMES) == set(option_names("result"))
    given = {name: getattr(defaults, name) for name in option_names("unmasking", "drawing")}
    assert read_options(given, defaults) == given
    for name in option_names("result"):
        with pytest.raises(ValueError, match=f"holds \\['{name}'\\], but a reply is one text"):
            read_options({name: True}, defaults)


def test_greedy_decoding_resets_all_about_drawing(make_model: Callable) -> None:
    assert GREEDY.keys() == {"do_sample", *option_names("drawing")}
    model = make_model()
    expected = run(model, prompt_of(11), max_new_tokens=8).sequences
    model.generation_config.update(do_sample=True, t_max=9.0, t_min=5.0, sampling_seeds=[3])
    assert run(model, prompt_of(11), max_new_tokens=8, **GREEDY).sequences.equal(expected)


# -- an option is added in one place -----------------------------------------------------------------------------------


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> type[DecodingOptions]:
    """`DecodingOptions` with one field more; nothing else is changed."""
    option = ("brand_new", bool, dataclasses.field(default=False))
    more: Any = dataclasses.make_dataclass("MoreOptions", [option], bases=(DecodingOptions,), frozen=True)
    for module in (generation_options_relay, generation_relay):
        monkeypatch.setattr(module, "DecodingOptions", more)
    return more


def test_added_option_has_default_reaches_decoder_and_is_saved(
    added: type[DecodingOptions], make_model: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[bool] = []
    decode = generation_blocks_relay.BlockDecoder.run

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.options.brand_new)
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(generation_blocks_relay.BlockDecoder, "run", note)
    model = make_model()
    run(model, prompt_of(5), max_new_tokens=2)
    run(model, prompt_of(5), max_new_tokens=2, brand_new=True)
    model.generation_config.brand_new = True
    model.save_pretrained(tmp_path)
    run(RelayForMaskedDiffusion.from_pretrained(tmp_path), prompt_of(5), max_new_tokens=2)
    assert seen == [False, True, True]


def test_added_option_is_checked_and_offered_by_every_reader(
    added: type[DecodingOptions], make_model: Callable
) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="`brand_new='yes'` must be True or False"):
        model.generate(prompt_of(5), max_new_tokens=2, brand_new="yes")
    assert option_names("unmasking") == (*GENERATION_OPTIONS, "brand_new")
    assert read_options({"brand_new": True}, model.generation_config) == {"brand_new": True}
    family = default_options(config_of(8, generation_defaults={"brand_new": True}))
    assert family["brand_new"] is True


# -- defaults and parsing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_size", "own", "expected"),
    [
        (32, {}, ("confidence_threshold", 0.85, 8)),
        (12, {}, ("confidence_threshold", 0.85, None)),
        (None, {}, ("confidence_budget", 0.15, None)),
        (None, {"unmasking_threshold": 0.3}, ("confidence_budget", 0.3, None)),
        (32, {"sub_block_size": None}, ("confidence_threshold", 0.85, None)),
    ],
)
def test_defaults_follow_model_and_family(block_size: int | None, own: dict[str, Any], expected: tuple) -> None:
    defaults = default_options(config_of(block_size, generation_defaults=own))
    assert tuple(defaults[name] for name in ("unmasking_policy", "unmasking_threshold", "sub_block_size")) == expected


def test_assigned_generation_config_gets_missing_options_and_keeps_its_own(make_model: Callable) -> None:
    model, plain = make_model(), GenerationConfig(unmasking_threshold=0.25, eos_token_id=5)
    model.generation_config = plain
    assert model.generation_config is plain
    assert (plain.unmasking_threshold, plain.eos_token_id) == (0.25, 5)
    assert DecodingOptions.of(model.config, plain) == DecodingOptions(unmasking_threshold=0.25)


def test_generate_parses_options_once_and_completes_no_generation_config(
    make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = make_model(), []
    parse, complete = DecodingOptions.__post_init__, generation_relay.complete_generation_config

    def note(name: str, function: Callable) -> Callable:
        def noted(*args: Any) -> Any:
            calls.append(name)
            return function(*args)

        return noted

    monkeypatch.setattr(DecodingOptions, "__post_init__", note("parsed", parse))
    monkeypatch.setattr(generation_relay, "complete_generation_config", note("completed", complete))
    run(model, prompt_of(11), max_new_tokens=20)
    assert calls == ["parsed"]
    model.generation_config = GenerationConfig()
    assert calls == ["parsed", "completed"]


def test_options_of_one_call_are_not_kept_on_the_model(make_model: Callable) -> None:
    model = make_model()
    before = {name: id(value) for name, value in vars(model).items()}
    run(model, prompt_of(11), max_new_tokens=8, fuse_commits=True, sub_block_size=2)
    assert {name: id(value) for name, value in vars(model).items()} == before


def test_options_build_policy_once() -> None:
    options = DecodingOptions(unmasking_policy="fixed_count", unmasking_threshold=2, unmasking_order="margin")
    assert options.policy.reads == "margin"
    assert options.policy is options.policy


def test_seeds_default_to_torch_generator_and_fit_the_rows() -> None:
    torch.manual_seed(3)
    first = DecodingOptions().seeds(4)
    torch.manual_seed(3)
    assert DecodingOptions().seeds(4).equal(first)
    assert len(set(first.tolist())) == 4
    assert DecodingOptions(sampling_seeds=[7, -1]).seeds(2).tolist() == [7, -1]
    with pytest.raises(ValueError, match="`sampling_seeds` has 2 numbers for 3 rows: give one per returned row"):
        DecodingOptions(sampling_seeds=[7, -1]).seeds(3)
