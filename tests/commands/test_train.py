from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, Qwen2ForCausalLM
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig
from trl.scripts.utils import DatasetConfig

from relay_hf import RelayForMaskedDiffusion, RelayTrainer, RelayTrainerConfig
from relay_hf.cli import main
from relay_hf.commands.train_arguments import RelayModelConfig, help_text
from relay_hf.commands.train_data import load_splits, names_for_card

from ..conftest import text_config
from .conftest import write_rows


def train(recipe: Path, **options: Any) -> None:
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert main(["train", "--config", str(recipe), *given]) == 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(left: Path, right: Path) -> None:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_recipe_trains_what_the_trainer_trains(
    recipe: Callable[..., Path], checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    train(recipe())
    args = RelayTrainerConfig(
        str(tmp_path / "python"), max_steps=2, learning_rate=1e-2, per_device_train_batch_size=4, max_length=64,
        logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    dataset = load_dataset("json", data_files=str(rows), split="train")
    trainer = RelayTrainer(str(checkpoint), args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    assert_equal_weights(tmp_path / "run", tmp_path / "python")
    assert not torch.equal(weights(tmp_path / "run")["lm_head.weight"], weights(checkpoint)["lm_head.weight"])


def test_output_holds_model_tokenizer_and_card(recipe: Callable[..., Path], tmp_path: Path) -> None:
    train(recipe(objective="rollout"))
    folder = tmp_path / "run"
    assert isinstance(AutoModel.from_pretrained(folder), RelayForMaskedDiffusion)
    assert AutoTokenizer.from_pretrained(folder).mask_token == "[MASK]"
    card = ModelCard.load(folder / "README.md")
    assert "| `objective` | `rollout` |" in card.content
    assert "- Steps: 2" in card.content
    assert "on unnamed files with the objective" in card.content


def test_card_names_data_sets_of_the_hub_and_leaves_out_none(tmp_path: Path) -> None:
    files = DatasetConfig("json", data_files=str(tmp_path / "secret.jsonl"))
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig("org/text"), files, DatasetConfig("imdb"), files])
    assert names_for_card(ScriptArguments(), mixture) == ["org/text", "unnamed files", "imdb"]
    for name, named in (("org/text", "org/text"), ("a/secret.csv", "unnamed files"), (str(tmp_path), "unnamed files")):
        assert names_for_card(ScriptArguments(dataset_name=name), DatasetMixtureConfig()) == [named]


def test_command_line_wins_over_recipe(recipe: Callable[..., Path], tmp_path: Path) -> None:
    train(recipe(max_steps=2), max_steps=1, output_dir=tmp_path / "other")
    assert "- Steps: 1" in (tmp_path / "other" / "README.md").read_text()
    assert not (tmp_path / "run").exists()


def test_resumed_run_equals_an_uninterrupted_one(recipe: Callable[..., Path], tmp_path: Path) -> None:
    whole = recipe(max_steps=3, save_strategy="steps", save_steps=2)
    train(whole)
    train(whole, output_dir=tmp_path / "resumed", resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    assert_equal_weights(tmp_path / "run", tmp_path / "resumed")


def test_resume_true_takes_the_last_checkpoint(recipe: Callable[..., Path], tmp_path: Path) -> None:
    saving = recipe(max_steps=1, save_strategy="steps", save_steps=1)
    train(saving)
    train(saving, max_steps=2, resume_from_checkpoint="true", report_to="none")
    assert "- Steps: 2" in (tmp_path / "run" / "README.md").read_text()
    assert '"global_step": 2' in (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text()


def test_lora_saves_adapters_and_a_merged_model(
    recipe: Callable[..., Path], tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    train(recipe(use_peft=True, lora_r=2, relay_learning_rate=1e-2))
    folder = tmp_path / "run"
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    merged, base = weights(folder / "merged"), weights(checkpoint)
    cards = [(place / "README.md").read_text() for place in (folder, folder / "merged")]
    assert f'AutoModel.from_pretrained("{folder / "merged"}")' in cards[1]
    assert cards[1] == cards[0].replace(f'from_pretrained("{folder}")', f'from_pretrained("{folder / "merged"}")')
    changed = {name.split(".")[-2] for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {"norm", "q_proj", "v_proj"}
    assert not torch.equal(base["relay.norm.weight"], merged["relay.norm.weight"])
    capsys.readouterr()  # of training
    written = []
    for place in (folder / "merged", folder):  # adapters are loaded onto the checkpoint that they name
        assert main(["generate", str(place), "hi", "--max_new_tokens", "4"]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]


def test_lora_merged_model_can_be_left_out(recipe: Callable[..., Path], tmp_path: Path) -> None:
    train(recipe(use_peft=True, save_merged=False, max_steps=1))
    assert not (tmp_path / "run" / "merged").exists()


def test_plain_decoder_becomes_a_relay_model(
    recipe: Callable[..., Path], checkpoint: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    torch.manual_seed(0)
    Qwen2ForCausalLM(text_config(vocab_size=259, num_hidden_layers=1)).save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "plain")
    plain = recipe(model_name_or_path=str(tmp_path / "plain"), max_steps=1)
    assert "`mask_token_id`" in refuse("train", "--config", plain)
    train(plain, mask_token_id=258, block_size=0, token_shift="false", relay_channel="soft_mask", objective="relay_sg")
    config = AutoModel.from_pretrained(tmp_path / "run").config
    assert (config.mask_token_id, config.block_size, config.token_shift) == (258, None, False)
    assert config.relay_channel == "soft_mask"


def test_residual_context_learns_from_a_reference_model(
    recipe: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    train(recipe(objective="residual_context", relay_channel="residual_context", reference_model=str(checkpoint)))
    assert "frozen" in (tmp_path / "run" / "README.md").read_text()


def test_further_fields_of_the_model_go_through_model_init_kwargs(recipe: Callable[..., Path], tmp_path: Path) -> None:
    train(recipe(model_init_kwargs={"relay_initial_state": "none"}, max_steps=1))
    assert AutoModel.from_pretrained(tmp_path / "run").config.relay_initial_state == "none"


def test_mixture_evaluates_on_rows_kept_apart(
    recipe: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RelayTrainer] = []
    monkeypatch.setattr(RelayTrainer, "train", lambda self, **_: seen.append(self))
    mixture = [{"path": "json", "data_files": str(rows)}, {"path": "json", "data_files": str(rows)}]
    for folder in ("first", "second"):
        mixed = recipe(dataset_name=None, datasets=mixture, test_split_size=0.25, eval_strategy="epoch")
        train(mixed, output_dir=tmp_path / folder)
    assert [len(data) for data in (seen[0].train_dataset, seen[0].eval_dataset)] == [18, 6]
    assert seen[0].eval_dataset["input_ids"][:] == seen[1].eval_dataset["input_ids"][:]


def test_folder_gives_its_test_split(
    recipe: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RelayTrainer] = []
    monkeypatch.setattr(RelayTrainer, "train", lambda self, **_: seen.append(self))
    (tmp_path / "data").mkdir()
    lines = rows.read_text().splitlines(keepends=True)
    (tmp_path / "data" / "train.jsonl").write_text("".join(lines[:9]))
    (tmp_path / "data" / "test.jsonl").write_text("".join(lines[9:]))
    train(recipe(dataset_name=str(tmp_path / "data"), eval_strategy="epoch"))
    assert [len(data) for data in (seen[0].train_dataset, seen[0].eval_dataset)] == [9, 3]


def test_push_to_hub_pushes_the_card_too(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Any] = []
    monkeypatch.setattr(RelayTrainer, "push_to_hub", lambda self, **options: pushed.append(options))
    monkeypatch.setattr(RelayTrainer, "init_hf_repo", lambda self, **_: None)
    monkeypatch.setattr(RelayTrainer, "train", lambda self, **_: None)
    monkeypatch.setattr(RelayTrainer, "_push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr(RelayTrainer, "save_model", lambda self: None)
    train(recipe(push_to_hub=True))
    assert pushed == [{"dataset_name": ["unnamed files"]}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"learning_rat": 1},
            "`learning_rat` is not an option of `relay-hf train`: did you mean `learning_rate`? (in `{recipe}`)",
        ),
        ({"zzzzzz": 1}, "--help_all"),
        ({"dataset_name": "nowhere.jsonl"}, "`dataset_name=nowhere.jsonl` does not exist"),
        ({"dataset_name": None}, "`dataset_name` and `datasets`"),
        ({"datasets": [{"path": "json"}]}, "`dataset_name` and `datasets`"),
        ({"model_name_or_path": "nobody/nothing"}, "`nobody/nothing` is not a model"),
        ({"model_name_or_path": None}, "--model_name_or_path"),
        ({"relay_channel": "wire"}, "wire"),
        ({"objective": "magic"}, "`objective='magic'` is unknown"),
        ({"ignore_bias_buffers": True}, "`ignore_bias_buffers`"),
        ({"block_size": -1}, "`block_size=-1`"),
        ({"eval_strategy": "epoch"}, "`eval_strategy=epoch` has no rows"),
        ({"dataset_streaming": True, "test_split_size": 0.5}, "`test_split_size`"),
        ({"resume_from_checkpoint": "nowhere"}, "`resume_from_checkpoint=nowhere` is no folder"),
        ({"max_steps": [1, 2]}, "`max_steps: [1, 2]` in `{recipe}` is not one value"),
        ({"max_steps": 2.5}, "`max_steps: 2.5` in `{recipe}` is not a whole number"),
        ({"learning_rate": True}, "`learning_rate: True` in `{recipe}` is not a number"),
        ({"dataset_name": None, "datasets": "json"}, "`datasets` in `{recipe}` is not a list"),
        ({"dataset_name": None, "datasets": [{"path": "json", "data_file": "x"}]}, "does not take ['data_file']"),
        ({"model_init_kwargs": "pre_norm"}, "`model_init_kwargs=pre_norm` has no names"),
        ({"model_init_kwargs": {"relay_readuot": "pre_norm"}}, "does not take ['relay_readuot']"),
        ({"report_to": "neptune"}, "`report_to=neptune` needs a package"),
        ({"mask_token_id": 999}, "`mask_token_id=999`"),
        ({"packing": True, "packing_strategy": "wrapped"}, "`packing_strategy='wrapped'`"),
        ({"dataset_name": None, "datasets": [{"path": "json", "fraction": 0}]}, "`fraction: 0` of a data set"),
        ({"test_split_size": 0}, "`test_split_size=0` is no part of the rows: give a number between 0 and 1"),
        ({"test_split_size": 1.0, "eval_strategy": "epoch"}, "`test_split_size=1` is no part of the rows"),
        ({"model_name_or_path": "a/x.gguf"}, "run `relay-hf convert a/x.gguf FOLDER`"),
        ({"reference_model": "a/x.gguf"}, "run `relay-hf convert a/x.gguf FOLDER`"),
        ({"use_peft": True, "lora_target_modules": ["q_proj", "q_prj"]}, "`target_modules` names `q_prj`, but no"),
        ({"use_peft": True, "lora_modules_to_save": ["embeddings"]}, "`modules_to_save` names `embeddings`, but no"),
    ],
)
def test_bad_recipe_is_one_sentence_and_exit_code_2(
    options: dict[str, Any], message: str, recipe: Callable[..., Path], refuse: Callable[..., str], tmp_path: Path
) -> None:
    path = recipe(**options)
    assert message.format(recipe=path) in refuse("train", "--config", path)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--config", "nowhere.yaml"],
            "no recipe: give a YAML file, or one of the library's recipes (fast_dllm_v2_relay",
        ),
        (["--config", "{broken}"], "is not YAML"),
        (["--config", "{empty}"], "holds no options"),
        (["smoke"], "did you mean `--config smoke`?"),
        (["--config", "{recipe}", "--dataset_name", "{nothing}"], "nothing.jsonl` is empty"),
        (["--config", "{recipe}", "--learning-rat", "1"], "did you mean `learning_rate`?"),
        (["--config", "{recipe}", "--learning_rat=1"], "did you mean `learning_rate`?"),
    ],
)
def test_bad_command_line_is_one_sentence_and_exit_code_2(
    argv: list[str], message: str, recipe: Callable[..., Path], refuse: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "nothing.jsonl").touch()
    places = {"recipe": recipe(), "broken": tmp_path / "broken.yaml", "empty": tmp_path / "empty.yaml"}
    places["nothing"] = tmp_path / "nothing.jsonl"
    assert message in refuse("train", *[text.format(**places) for text in argv])


@pytest.mark.parametrize("argv", [["--config"], ["--config={recipe}", "--max_steps", "many"]])
def test_value_that_cannot_be_read_is_told_with_exit_code_2(
    argv: list[str], recipe: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *[text.format(recipe=recipe()) for text in argv]])
    assert stopped.value.code == 2
    assert "relay-hf train: error: argument" in capsys.readouterr().err


def test_rows_without_text_are_refused_before_training(
    recipe: Callable[..., Path], refuse: Callable[..., str], tmp_path: Path
) -> None:
    poems = write_rows(tmp_path / "poems.jsonl", [{"poem": "roses"}])
    assert "['poem']" in refuse("train", "--config", recipe(dataset_name=str(poems)))


def test_columns_of_csv_are_the_texts_that_were_written(tmp_path: Path) -> None:
    cells = "0" * 40 + "1" * 41
    (tmp_path / "rows.csv").write_text(f"prompt,completion\n{cells},{cells[::-1]}\n007,None\n1.50,true\nempty,\n")
    for streams in (False, True):
        data = ScriptArguments(dataset_name=str(tmp_path / "rows.csv"), dataset_streaming=streams)
        rows, _ = load_splits(data, DatasetMixtureConfig(), RelayTrainerConfig(str(tmp_path / "run"), use_cpu=True))
        assert [(row["prompt"], row["completion"]) for row in rows] == [
            (cells, cells[::-1]),
            ("007", "None"),
            ("1.50", "true"),
            ("empty", None),  # which is refused as a row without text
        ]


def test_mixture_by_weight_takes_a_part_of_each_set(tmp_path: Path) -> None:
    sets = []
    for name, count, fraction in (("a", 8, 0.25), ("b", 6, 0.75)):
        path = write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": str(i)} for i in range(count)])
        sets.append(DatasetConfig("json", data_files=str(path), fraction=fraction))
    training = RelayTrainerConfig(str(tmp_path / "run"), use_cpu=True)
    rows, _ = load_splits(ScriptArguments(), DatasetMixtureConfig(datasets=sets), training)
    assert Counter(rows["prompt"]) == {"a": 2, "b": 6}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["q_proj"], ["q_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["all-linear"], "all-linear"),
        ([r".*\.q_proj"], r".*\.q_proj"),
    ],
)
def test_lora_target_modules_are_names_or_one_pattern(given: list[str], meant: Any) -> None:
    assert RelayModelConfig(model_name_or_path="a", lora_target_modules=given).lora_target_modules == meant


def test_file_that_is_not_json_is_told(recipe: Callable[..., Path], refuse: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    path = tmp_path / "broken.jsonl"
    assert f"Line 1 of `{path}` is no JSON" in refuse("train", "--config", recipe(dataset_name=str(path)))


def test_help_begins_with_what_is_ours(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("--objective") < shown.index("--mask_token_id") < shown.index("--model_name_or_path")
    assert all(f"  --{name}" in shown for name in RelayTrainerConfig.__annotations__)
    assert "smoke" in shown
    assert len(shown.splitlines()) < 150


def test_help_of_everything_leaves_out_nothing() -> None:
    shown = help_text("relay-hf train", "Trains.", everything=True)
    listed = [line.split()[0].removeprefix("--") for line in shown.splitlines() if line.startswith("  --")]
    known = {option.name for source in (SFTConfig, ModelConfig) for option in fields(source) if option.init}
    assert known <= set(listed)
    assert len(listed) == len(set(listed))
