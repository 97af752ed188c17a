from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig

from relay_hf.trainers import RelayTrainer

from .conftest import build_dataset, build_model


@pytest.mark.parametrize("objective", ["relay", "masked"])
def test_checkpoint_writes_a_card_of_what_ran(make_trainer: Callable[..., RelayTrainer], objective: str) -> None:
    trainer = make_trainer(objective=objective, save_strategy="steps", save_steps=2, learning_rate=3e-4)
    trainer.train()
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert f"| `objective` | `{objective}` |" in card.content
    assert "| `learning_rate` | `0.0003` |" in card.content
    assert "- Steps: 4" in card.content
    assert "None" not in card.content
    assert {"relay_hf", "relay"} <= set(card.data.tags)
    assert "![Losses against optimizer steps](training.png)" in card.content
    assert (Path(trainer.args.output_dir) / "training.png").stat().st_size > 10_000


def test_card_of_a_model_without_channel_does_not_claim_one(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer(build_model(relay_channel="none"), objective="rollout")
    trainer.create_model_card("plain", tags="mine")
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert "mine" in card.data.tags
    assert "relay" not in card.data.tags
    assert "carries" not in card.content


@pytest.mark.parametrize(
    ("model", "objective", "cited"),
    [
        ({}, "relay", ["2605.22967", "2509.26328"]),
        ({"block_size": None, "token_shift": False}, "relay", ["2605.22967"]),
        ({"relay_channel": "residual_context"}, "residual_context", ["2605.22967", "2601.22954", "2509.26328"]),
        ({"relay_channel": "soft_mask"}, "residual_context", ["2605.22967", "2510.17206", "2509.26328"]),
    ],
)
def test_card_cites_what_the_model_is_made_of(
    make_trainer: Callable[..., RelayTrainer], model: dict, objective: str, cited: list[str]
) -> None:
    trainer = make_trainer(build_model(**model), objective=objective)
    trainer.create_model_card("cited")
    card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    assert [line.split("{")[1].split("}")[0] for line in card.splitlines() if "eprint" in line] == cited
    assert "training.png" not in card, "nothing was logged"


def test_card_tells_rows_losses_and_adapters(make_trainer: Callable[..., RelayTrainer]) -> None:
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj", "q_proj"])
    trainer = make_trainer(trainer_options={"peft_config": lora, "eval_dataset": build_dataset()})
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card("told")
    card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    read = f"{trainer.state.epoch:.3g} epochs of it were read."
    assert f"The training set has {len(lengths)} rows of {lengths[0]} tokens; {read}" in card
    assert "- Wall time since the last start: " in card
    assert "| `adapter.r` | `2` |\n" in card
    assert "| `adapter.target_modules` | `q_proj, v_proj` |" in card
    held_out = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert f"- Last evaluation loss: {held_out[-1]:.4g}\n" in card
    parameters = sum(p.numel() for p in trainer.model.parameters())
    assert f"- Parameters: {parameters:,}\n- Backbone: `qwen2`, layers" in card


@pytest.mark.parametrize(
    ("names", "files", "linked"),
    [
        (None, [], None),
        (
            None,
            ["hf://datasets/org/text@abc/a.parquet", "hf://datasets/org/text@abc/b.parquet"],
            ["org/text"],
        ),
        (None, ["hf://datasets/imdb@abc/plain_text/a.parquet"], None),
        (None, ["hf://datasets/org/text/a.jsonl"], ["org/text"]),
        ("Sudoku 6x6", [], None),
        ("org/given", ["hf://datasets/org/text@abc/data/a.parquet"], ["org/given"]),
        (["org/one", "org/two"], [], ["org/one", "org/two"]),
        (None, ["/home/me/text.jsonl"], None),
    ],
)
def test_card_links_all_data_sets_of_the_hub(
    make_trainer: Callable[..., RelayTrainer], names: str | list[str] | None, files: list[str], linked: list[str] | None
) -> None:
    trainer = make_trainer()
    trainer.train_dataset.info.download_checksums = dict.fromkeys(files)
    trainer.create_model_card("linked", dataset_name=names)
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert card.data.datasets == linked
    for name in linked or []:
        assert f"- [{name}](https://huggingface.co/datasets/{name})" in card.content


def test_card_takes_no_folder_for_a_data_set_of_the_hub(
    make_trainer: Callable[..., RelayTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data/rows").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer()
    trainer.create_model_card("linked", dataset_name=["data/rows", "org/text"])
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert card.data.datasets == ["org/text"]
    assert "trained on rows and org/text with the objective" in card.content


def test_card_tells_rarer_arguments_where_they_were_given(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer(adam_beta2=0.95, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 0.1})
    trainer.create_model_card("told")
    card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    assert "| `adam_beta2` | `0.95` |\n" in card
    assert "| `lr_scheduler_kwargs` | `{'min_lr': 0.1}` |\n" in card
    assert "adam_beta1" not in card


def test_card_tells_at_most_forty_of_the_logged_losses(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer()
    trainer.state.log_history = [{"step": step, "loss": 1000.0 - step} for step in range(1, 101)]
    trainer.state.log_history += [
        {"step": 100, "eval_loss": 7.0, "eval_runtime": 1.0},
        {"step": 100, "train_loss": 9.0},
    ]
    trainer.create_model_card("logged")
    card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    rows = card.partition("<details>")[2].partition("</details>")[0].strip().splitlines()[2:]
    assert rows[:3] == ["| Step | Training loss | Evaluation loss |", "| --- | ---: | ---: |", "| 1 | 999 |  |"]
    assert rows[-2:] == ["| 97 | 903 |  |", "| 100 | 900 | 7 |"]
    assert len(rows) == 2 + 34
    assert "- Last training loss: 900\n- Last evaluation loss: 7\n" in card


def test_card_tells_the_lengths_of_the_first_rows(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer()
    lengths = [3] * 999 + [9] + [40] * 200
    trainer.train_dataset = Dataset.from_dict({"input_ids": [[5] * length for length in lengths]})
    trainer.create_model_card("lengths")
    card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    assert "The training set has 1,200 rows of 3 to 9 tokens, 3 on average in the first 1,000." in card


def test_card_of_a_stream_says_nothing_of_its_rows(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer()
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    trainer.create_model_card("streamed")
    assert "The training set" not in (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
