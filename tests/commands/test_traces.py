"""`relay-hf traces`: from prompts to rows that `relay-hf train` follows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoTokenizer

from relay_hf.cli import main
from relay_hf.commands import trace_files
from relay_hf.loading.tokenizer import encode_prompt
from relay_hf.testing import byte_tokenizer, tiny_model

from .conftest import write_rows

PROMPTS = [{"prompt": f"q{number}", "answer": "abc"} for number in range(5)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", PROMPTS)


def command(checkpoint: Path, output: Path, prompts: Path, *argv: Any) -> list[str]:
    options = ["--dataset_name", prompts, "--max_new_tokens", 12, "--batch_size", 2, "--device", "cpu", *argv]
    return ["traces", *map(str, [checkpoint, output, *options])]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_traces_are_the_texts_and_reveals_of_generate(
    checkpoint: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out" / "traces.jsonl"
    assert main(command(checkpoint, output, prompts)) == 0
    rows = read(output)
    model, tokenizer = AutoModel.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    for number, row in enumerate(rows):
        inputs = encode_prompt(tokenizer, f"q{number}")
        text = model.generate(**inputs, max_new_tokens=12, return_dict_in_generate=True, output_history=True)
        width = inputs["input_ids"].shape[1]
        assert row["input_ids"] == text.sequences[0].tolist()
        assert row["labels"] == [-100] * width + row["input_ids"][width:]
        assert row["denoise_forwards"] == int(text.denoise_forwards[0])
        assert not any(row["reveal_steps"][:width])
    assert len(rows) == 5
    assert "kept: 5 texts, each of 12.0 tokens in" in capsys.readouterr().out


def test_traces_train_a_model(checkpoint: Path, prompts: Path, tmp_path: Path, recipe: Callable[..., Path]) -> None:
    output = tmp_path / "traces.jsonl"
    assert main(command(checkpoint, output, prompts)) == 0
    assert main(["train", "--config", str(recipe(dataset_name=str(output), objective="traces"))]) == 0
    assert "along traces of decoding" in (tmp_path / "run" / "README.md").read_text()


def test_interrupted_run_goes_on_with_the_same_file(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[..., str]
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "traces.jsonl"
    assert main(command(checkpoint, whole, prompts)) == 0
    decode, batches = trace_files.decode_traces, []

    def interrupted(model: Any, batch: Any, options: Any) -> Any:
        batches.append(len(batch))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return decode(model, batch, options)

    monkeypatch.setattr(trace_files, "decode_traces", interrupted)
    assert main(command(checkpoint, output, prompts)) == 130
    assert not output.exists()
    assert "run with other options" in refuse(*command(checkpoint, output, prompts, "--unmasking_threshold", 0.9))
    assert main(command(checkpoint, output, prompts)) == 0
    assert batches == [2, 2, 2, 1]
    assert output.read_text() == whole.read_text()
    assert sorted(path.name for path in tmp_path.glob("*traces*") if path.is_file()) == ["traces.jsonl"]


def test_traces_of_a_canvas_fill_in_what_is_labelled(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    for each in (tiny_model(tokenizer, block_size=None), tokenizer):
        each.save_pretrained(tmp_path / "canvas")
    given = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9]}
    rows, output = write_rows(tmp_path / "rows.jsonl", [given] * 2), tmp_path / "traces.jsonl"
    assert main(["traces", str(tmp_path / "canvas"), str(output), "--dataset_name", str(rows), "--device", "cpu"]) == 0
    for row in read(output):
        assert [place for place, label in enumerate(row["labels"]) if label == -100] == [0, 2]
        assert [row["input_ids"][place] for place in (0, 2)] == [5, 7]
        assert len(row["input_ids"]) == 5


def test_options_that_make_no_traces_are_refused(
    checkpoint: Path, prompts: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    output = tmp_path / "traces.jsonl"
    given = command(checkpoint, output, prompts)
    assert "`--check=truth` is unknown: choose one of none, answer" in refuse(*given, "--check", "truth")
    assert "There are no prompts: give a data set" in refuse("traces", checkpoint, output)
    assert "Row 0 of the data set cannot be asked. There is no text" in refuse(*given, "--prompt_column", "question")
    assert "None of 5 texts is right by `--check=answer`" in refuse(*given, "--check", "answer")
    output.touch()
    assert "exists already" in refuse(*given)
