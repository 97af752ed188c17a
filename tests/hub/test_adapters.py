"""Adapters: they load as the relay model that they were trained in, from a folder and from the Hub."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from relay_hf import RelayConfig, RelayForMaskedDiffusion, push
from relay_hf.cli import main
from relay_hf.hub.contents import CODE
from relay_hf.hub_cards import RelayCardData
from relay_hf.modeling.loading_adapters_relay import ADAPTER_BASE_FIELD, complete_adapter

from .conftest import MASK, generated
from .hub_server import TOKEN, Commit, HubServer, Repository

MakeAdapter = Callable[..., PeftModel]
FILES = {"adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json", "README.md"}


def test_pushed_adapter_loads_everywhere_as_the_model_it_was_trained_in(
    hub: HubServer, make_adapter: MakeAdapter, tokenizer: PreTrainedTokenizerFast
) -> None:
    adapter = make_adapter()
    expected = generated(adapter)
    assert expected != generated(adapter, use_relay=False)
    push(adapter, "me/adapter", tokenizer=tokenizer)
    repository = hub.repositories["me/adapter"]
    assert len(repository.commits) == 2
    names = FILES | {"tokenizer.json", "tokenizer_config.json", ".gitattributes"} | {path.name for path in CODE}
    assert set(repository.files) == names
    for loader in (RelayForMaskedDiffusion, AutoModel, AutoModelForCausalLM, AutoPeftModelForCausalLM):
        assert generated(loader.from_pretrained("me/adapter")) == expected, loader
    pipe = pipeline("text-generation", model="me/adapter")
    assert isinstance(pipe.model, RelayForMaskedDiffusion)
    assert generated(pipe.model) == expected
    base = RelayForMaskedDiffusion.from_pretrained("me/base", config=RelayConfig.from_pretrained("me/adapter"))
    assert generated(PeftModel.from_pretrained(base, "me/adapter")) == expected
    pinned = AutoModel.from_pretrained("me/adapter", revision=repository.commits[-1].oid)
    assert generated(pinned) == expected


def test_adapter_card_names_its_base(hub: HubServer, make_adapter: MakeAdapter) -> None:
    push(make_adapter(), "me/adapter")
    card = ModelCard(hub.repositories["me/adapter"].files["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("me/base", "adapter")
    assert "relay_hf" in card.data.tags
    assert "More Information Needed" not in card.content  # which PEFT leaves


@pytest.mark.parametrize(
    ("base_card", "told"),
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
         {"license": "other", "license_name": "own", "license_link": "LICENSE"}),
        ("# No metadata", {}),
        ("---\ntags: [a\n---\n", {}),
        (None, {}),
    ],
)  # fmt: skip
def test_card_without_license_gets_that_of_the_base(
    hub: HubServer, make_adapter: MakeAdapter, base_card: str | None, told: dict[str, str]
) -> None:
    adapter = make_adapter()
    if base_card is not None:
        hub.repositories["me/base"].files["README.md"] = base_card.encode()
    push(adapter, "me/adapter")
    metadata = ModelCard(hub.repositories["me/adapter"].files["README.md"].decode()).data.to_dict()
    assert {name: value for name, value in metadata.items() if name.startswith("license")} == told


def test_license_that_is_named_stays(hub: HubServer, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    hub.repositories["me/base"].files["README.md"] = b"---\nlicense: mit\n---\n"
    push(adapter, "me/adapter", card=RelayCardData("mine", license="apache-2.0"))
    assert ModelCard(hub.repositories["me/adapter"].files["README.md"].decode()).data.license == "apache-2.0"


def test_adapter_with_generation_defaults_of_its_own_keeps_them(hub: HubServer, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    adapter.get_base_model().generation_config.unmasking_threshold = 0.3
    push(adapter, "me/adapter")
    assert AutoModel.from_pretrained("me/adapter").generation_config.unmasking_threshold == 0.3


def test_merged_adapter_is_a_whole_model(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(str(tmp_path / "base"))
    adapter.save_pretrained(tmp_path / "adapter")
    complete_adapter(adapter.get_base_model(), tmp_path / "adapter")
    loaded = AutoModel.from_pretrained(tmp_path / "adapter")
    assert generated(loaded) == generated(adapter)
    assert not hasattr(loaded.config, ADAPTER_BASE_FIELD)
    merged = adapter.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert ADAPTER_BASE_FIELD not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert generated(AutoModel.from_pretrained(tmp_path / "merged")) == generated(merged)


def test_adapter_of_a_folder_needs_the_name_of_its_base(
    hub: HubServer, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"base is `.*base`, which others cannot load: push the base"):
        push(adapter, "me/adapter")
    with pytest.raises(ValueError, match="`me/nothing` cannot be read from the Hub"):
        push(adapter, "me/adapter", base_model="me/nothing")
    make_adapter("me/base", num_hidden_layers=3)
    with pytest.raises(ValueError, match="`num_hidden_layers=2`, but `me/base` has 3"):
        push(adapter, "me/adapter", base_model="me/base")
    assert list(hub.repositories) == ["me/base"]
    push(RelayForMaskedDiffusion.from_pretrained(tmp_path / "base", mask_token_id=MASK), "me/relay-base")
    push(adapter, "me/adapter", base_model="me/relay-base")
    assert generated(AutoModel.from_pretrained("me/adapter")) == generated(adapter)


def test_adapter_folder_without_relay_configuration_is_refused(
    hub: HubServer, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    make_adapter().save_pretrained(tmp_path / "adapter")  # PEFT's own files only
    with pytest.raises(FileNotFoundError, match=r"an adapter, but no `config.json` of its relay model"):
        push(tmp_path / "adapter", "me/adapter")


def test_adapter_beside_the_merged_model_is_pushed_with_a_word_about_it(
    hub: HubServer, make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    adapter = make_adapter(str(tmp_path / "base"))
    adapter.save_pretrained(tmp_path / "run")
    merged = tmp_path / "run" / "merged"
    merged.mkdir()
    (merged / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"or push `{merged}`, which holds the whole model"):
        push(tmp_path / "run", "me/adapter")
    complete_adapter(adapter.get_base_model(), tmp_path / "run")
    assert main(["push", str(tmp_path / "run"), "me/adapter"]) == 2
    note, error = (line for line in capsys.readouterr().err.splitlines() if line.startswith("relay-hf: "))
    assert f"the whole model is in `{merged}`" in note
    assert f"or push `{merged}`, which holds the whole model" in error
    assert not hub.repositories


def test_adapter_without_peft_says_what_to_install(
    make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(str(tmp_path / "base"))
    adapter.save_pretrained(tmp_path / "adapter")
    complete_adapter(adapter.get_base_model(), tmp_path / "adapter")
    monkeypatch.setattr("relay_hf.modeling.loading_adapters_relay.is_peft_available", lambda: False)
    with pytest.raises(ImportError, match="needs peft: run `pip install peft`"):
        RelayForMaskedDiffusion.from_pretrained(tmp_path / "adapter")


def test_loaded_adapter_can_be_pushed_and_saved_again(
    hub: HubServer, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter()
    push(adapter, "me/adapter")
    loaded = AutoModel.from_pretrained("me/adapter")
    push(loaded, "me/again")
    wrapped = PeftModel.from_pretrained(
        RelayForMaskedDiffusion.from_pretrained("me/base", config=loaded.config), "me/again"
    )
    push(wrapped, "me/third")
    snapshot_download("me/third", local_dir=tmp_path / "local")
    push(tmp_path / "local", "me/fourth")
    for place in ("me/again", "me/third", tmp_path / "local", "me/fourth"):
        assert generated(AutoModel.from_pretrained(place)) == generated(adapter)


def test_copied_adapter_repository_loads_its_own_weights(hub: HubServer, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    push(adapter, "me/original")
    copy = Repository()
    copy.commits.append(Commit("Copy", dict(hub.repositories["me/original"].files)))
    hub.repositories["me/copy"] = copy
    expected = generated(adapter)
    torch.nn.init.zeros_(adapter.get_base_model().relay.modules_to_save.default.norm.weight)
    push(adapter, "me/original")
    assert generated(AutoModel.from_pretrained("me/original")) == generated(adapter) != expected
    assert generated(AutoModel.from_pretrained("me/copy")) == expected


def test_private_adapter_of_a_private_base_loads_with_a_token(
    hub: HubServer, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter()
    push(adapter, "me/adapter", private=True)
    hub.repositories["me/base"].private = True
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    options = {"token": TOKEN, "cache_dir": tmp_path / "other", "force_download": True}
    for loader in (AutoModel, RelayForMaskedDiffusion):
        assert generated(loader.from_pretrained("me/adapter", **options)) == generated(adapter)
    with pytest.raises(OSError, match="me/adapter"):
        AutoModel.from_pretrained("me/adapter", cache_dir=tmp_path / "third")


def test_whole_model_takes_the_place_of_an_adapter(
    hub: HubServer, make_adapter: MakeAdapter, model: RelayForMaskedDiffusion
) -> None:
    push(make_adapter(), "me/one")
    push(model, "me/one")
    assert not [name for name in hub.repositories["me/one"].files if name.startswith("adapter_config")]
    assert generated(AutoModel.from_pretrained("me/one")) == generated(model)
