"""What a push sends, and what it refuses to send."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from relay_hf import RelayConfig, RelayForMaskedDiffusion, push
from relay_hf.cli import main
from relay_hf.hub.contents import AUTO_MAP, CODE
from relay_hf.hub_cards import RelayCardData
from relay_hf.testing import byte_tokenizer

from .hub_server import HubServer

MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
ALL_FILES = MODEL_FILES | TOKENIZER_FILES | {"README.md", ".gitattributes"} | {path.name for path in CODE}


# Four tokens more than the bytes.
LONG = {"mask_token": "[MASK]", "pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}


def rewrite_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_push_model_is_one_commit_with_everything(
    hub: HubServer, model: RelayForMaskedDiffusion, tokenizer: PreTrainedTokenizerFast
) -> None:
    done = push(model, "me/relay", tokenizer=tokenizer, private=True, commit_message="First")
    repository = hub.repositories["me/relay"]
    assert [commit.message for commit in repository.commits] == ["initial commit", "First"]
    assert done.oid == repository.commits[-1].oid
    assert repository.private
    assert set(repository.files) == ALL_FILES
    assert json.loads(repository.files["config.json"])["auto_map"] == AUTO_MAP
    assert not hasattr(model.config, "auto_map")


def test_push_folder_takes_what_readers_need_and_leaves_it_as_it_is(hub: HubServer, folder: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "rollout_buffer_0.safetensors", ".env", "notes.txt", "mine.py"):
        (folder / name).write_bytes(b"private")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "model.safetensors").write_bytes(b"older")
    (folder / "curve.png").write_bytes(b"picture")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["push", str(folder), "me/relay"]) == 0
    assert set(hub.repositories["me/relay"].files) == ALL_FILES | {"curve.png"}
    assert hub.repositories["me/relay"].files["model.safetensors"] == before[folder / "model.safetensors"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_push_again_replaces_weights_of_another_layout_and_keeps_what_others_wrote(
    hub: HubServer, model: RelayForMaskedDiffusion, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    push(tmp_path / "shards", "me/relay")
    repository = hub.repositories["me/relay"]
    assert "model.safetensors.index.json" in repository.files
    repository.files["README.md"] = b"written by hand"
    repository.files["notes.md"] = b"as well"
    push(model, "me/relay")
    weights = [name for name in repository.files if name.startswith(("model.", "model-"))]
    assert weights == ["model.safetensors"]
    assert repository.files["README.md"] == b"written by hand"
    assert repository.files["notes.md"] == b"as well"


def test_push_same_again_makes_no_commit_of_its_own(hub: HubServer, folder: Path) -> None:
    first = push(folder, "me/relay")
    assert push(folder, "me/relay").oid == first.oid


def test_push_to_a_branch_leaves_main(hub: HubServer, folder: Path) -> None:
    push(folder, "me/relay")
    repository = hub.repositories["me/relay"]
    repository.branches["trial"] = list(repository.commits)
    push(folder, "me/relay", revision="trial", card=RelayCardData(name="Another"))
    assert len(repository.commits) == 2
    assert len(repository.branches["trial"]) == 3


# -- cards ------------------------------------------------------------------------------------------------------------


def test_push_without_card_writes_one_that_says_how_to_use_it(hub: HubServer, folder: Path) -> None:
    push(folder, "me/relay")
    card = ModelCard(hub.repositories["me/relay"].files["README.md"].decode())
    assert {"relay_hf", "relay"} <= set(card.data.tags)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert 'AutoModel.from_pretrained("me/relay")' in card.content
    assert "None" not in card.content


def test_push_given_card_replaces_that_of_the_folder(hub: HubServer, folder: Path) -> None:
    (folder / "README.md").write_text("# Of the folder")
    push(folder, "me/one")
    push(folder, "me/two", card=RelayCardData(name="Given"))
    assert hub.repositories["me/one"].files["README.md"] == b"# Of the folder"
    assert b"# Given" in hub.repositories["me/two"].files["README.md"]


# -- refused before anything is sent ----------------------------------------------------------------------------------


def spoil_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weights, r"`lm_head.weight` in `model.safetensors` is not finite"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"\['model.safetensors'\] are missing"),
        (lambda folder: (folder / "config.json").unlink(), "holds no `config.json`"),
        (lambda folder: rewrite_json(folder / "config.json", model_type="llama"), "of a `llama`, not of a relay model"),
        (lambda folder: rewrite_json(folder / "config.json", relay_layer=9), "`relay_layer=9` does not exist"),
        (lambda folder: rewrite_json(folder / "config.json", relay_scope="some"), "relay_scope"),
        (lambda folder: rewrite_json(folder / "config.json", mask_token_id=3), r"\[MASK\] is 258, the model's 3"),
        (lambda folder: (folder / "README.md").write_text("---\ntags: [a\n---\n"), "metadata of `README.md`"),
        (lambda folder: byte_tokenizer(**LONG).save_pretrained(folder), "has 260 tokens, the model 259"),
    ],
)
def test_push_useless_folder_is_refused_before_anything_is_sent(
    spoil: Any, message: str, hub: HubServer, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=message):
        push(folder, "me/relay")
    assert not [request for request in hub.requests if not request.startswith(("GET", "HEAD"))]
    assert main(["push", str(folder), "me/relay"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_push_of_something_else_is_refused(hub: HubServer, folder: Path) -> None:
    decoder = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="`source` is a LlamaForCausalLM"):
        push(decoder, "me/relay")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        push(folder / "nowhere", "me/relay")
    with pytest.raises(ValueError, match="`base_model='me/base'` is for adapters"):
        push(folder, "me/relay", base_model="me/base")
    for name in ("relay", "a/b/c", "me/re lay"):
        with pytest.raises(ValueError, match="write it as `owner/name`"):
            push(folder, name)
    assert hub.repositories == {}


def test_push_tokenizer_without_mask_token_is_taken(hub: HubServer, model: RelayForMaskedDiffusion) -> None:
    push(model, "me/relay", tokenizer=byte_tokenizer(eos_token=None, mask_token=None))
    assert "tokenizer.json" in hub.repositories["me/relay"].files
    assert RelayConfig.from_pretrained("me/relay").mask_token_id == 258
