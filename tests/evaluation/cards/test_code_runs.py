"""From `relay-hf eval` to the card, through the command line, with a random model."""

import gzip
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from relay_hf import RelayForMaskedDiffusion
from relay_hf.cli import main
from relay_hf.modeling.loading_adapters_relay import complete_adapter

EVALUATION = ["--max_new_tokens", "16", "--thresholds", "0.3", "0.9", "--batch_size", "4", "--device", "cpu"]
# Of a version that did not tell weights apart.
ROW = {"label": "x", "metrics": {"pass@1": 0.5}, "samples": 1, "threshold": 0.9}
COSTS = {"denoise_forwards": 1.0, "commit_forwards": 1.0, "prefill_forwards": 1.0}
OLD = json.dumps({"settings": {"model": "x"}, "results": [{"row": ROW | COSTS, "new_tokens": 1.0}]})


@pytest.fixture
def folder(model: RelayForMaskedDiffusion, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The model, as `save_pretrained` leaves it: without a card."""
    model.save_pretrained(tmp_path / "tiny")
    chat_tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def evaluate(model: Path, benchmark: Path, output: Path, *options: str) -> Path:
    command = ["eval", str(model), "--benchmark", str(benchmark), "--output_dir", str(output)]
    assert main([*command, *EVALUATION, *options]) == 0
    return output


def test_evaluation_and_comparison_become_a_card(folder: Path, benchmark: Path, tmp_path: Path) -> None:
    run = evaluate(folder, benchmark, tmp_path / "with")
    other = evaluate(folder, benchmark, tmp_path / "without", "--generation_options", '{"use_relay": false}')
    assert main(["card", str(folder), str(run), str(other)]) == 0
    card = ModelCard.load(folder / "README.md")
    results = json.loads((run / "results.json").read_text())["results"]
    assert len(card.data.eval_results) == len(results) == 2
    for entry, result in zip(card.data.eval_results, results, strict=True):
        assert entry.metric_value == pytest.approx(result["row"]["metrics"]["pass@1"])
        assert entry.metric_args["denoise_forwards"] == pytest.approx(result["row"]["denoise_forwards"])
        assert entry.metric_args["unmasking_threshold"] == result["row"]["threshold"]
    row = results[1]["row"]
    kinds = [f"{row[f'{kind}_forwards']:.2f}" for kind in ("denoise", "commit", "prefill")]
    accuracy = f"{100 * row['metrics']['pass@1']:.1f}"
    # The model's own threshold (0.85) was not among them, so the higher one stands for it.
    assert "| " + " | ".join(f"**{cell}**" for cell in ["tiny (with)", "0.9", accuracy, *kinds]) + " |" in card.text
    assert "| tiny (without) | 0.3 |" in card.text
    assert "### problems\n" in card.text
    assert "the evaluations differ in generation_options" in card.text
    assert card.text.count("Exact McNemar test") == 2
    assert "(evaluation-problems.png)" in card.text
    assert (folder / "evaluation-problems.png").stat().st_size > 10_000
    assert f'from_pretrained("{folder}")' in card.text
    assert card.data.model_name == "tiny"
    before = (folder / "README.md").read_text()
    assert main(["card", str(folder), str(run), str(other)]) == 0
    assert (folder / "README.md").read_text() == before


def test_names_come_from_folders_and_files_however_they_are_spelt(
    folder: Path, benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "Задачи.jsonl.gz"
    packed.write_bytes(gzip.compress(benchmark.read_bytes()))
    other = evaluate(folder, packed, tmp_path / "other", "--generation_options", '{"use_relay": false}')
    monkeypatch.chdir(folder)
    evaluate(Path("."), packed, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    assert main(["card", f"{folder}/", ".", str(other)]) == 0
    card = ModelCard.load(folder / "README.md")
    assert "| tiny (run) | 0.3 |" in card.text
    assert "### Задачи\n" in card.text
    assert "(evaluation-задачи.png)" in card.text
    assert {(result.dataset_name, result.dataset_type) for result in card.data.eval_results} == {("Задачи", "задачи")}


def test_plain_card_of_an_adapter_names_its_base_and_replaces_the_form_that_peft_writes(
    folder: Path, benchmark: Path, tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    adapter = get_peft_model(RelayForMaskedDiffusion.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "lora")
    complete_adapter(adapter.get_base_model(), tmp_path / "lora")
    chat_tokenizer.save_pretrained(tmp_path / "lora")
    run = evaluate(tmp_path / "lora", benchmark, tmp_path / "run")
    assert main(["card", str(tmp_path / "lora"), str(run)]) == 0
    card = (tmp_path / "lora/README.md").read_text()
    assert "adapted from `tiny`." in card
    assert "### problems" in card
    assert "More Information Needed" not in card


def test_model_that_is_no_folder_is_refused(
    folder: Path, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = evaluate(folder, benchmark, tmp_path / "run")
    assert main(["card", "me/tiny", str(run)]) == 2
    assert "`me/tiny` is no folder" in capsys.readouterr().err


def test_own_threshold_stands_for_the_model(folder: Path, benchmark: Path, tmp_path: Path) -> None:
    run = evaluate(folder, benchmark, tmp_path / "run", "--thresholds", "0.3", "0.85", "0.99")
    assert main(["card", str(folder), str(run)]) == 0
    assert "In bold, this model (tiny, threshold 0.85)" in (folder / "README.md").read_text()


def test_part_of_a_benchmark_is_not_called_the_benchmark(folder: Path, tmp_path: Path) -> None:
    run = evaluate(folder, Path("humaneval"), tmp_path / "run", "--limit", "1", "--max_new_tokens", "2")
    assert main(["card", str(folder), str(run)]) == 0
    (result, _) = ModelCard.load(folder / "README.md").data.eval_results
    assert (result.dataset_name, result.dataset_type) == (
        "HumanEval, first 1 problems",
        "humaneval-first-1-problems",
    )


def test_other_weights_are_not_this_models_results(
    folder: Path, model: RelayForMaskedDiffusion, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = evaluate(folder, benchmark, tmp_path / "run")
    model.lm_head.weight.data[3, 3] += 0.01
    model.save_pretrained(folder)
    assert main(["card", str(folder), str(run)]) == 2
    assert "evaluated other weights than those in" in capsys.readouterr().err
    assert not (folder / "README.md").exists()


def test_runs_of_other_problems_are_not_compared(
    folder: Path, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = evaluate(folder, benchmark, tmp_path / "run")
    other = evaluate(folder, benchmark, tmp_path / "other", "--limit", "4")
    assert main(["card", str(folder), str(run), str(other)]) == 2
    assert "answered different problems" in capsys.readouterr().err
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    "content", [None, "{}", "[", '{"settings": {}, "results": [1]}', '{"settings": {}, "results": []}', OLD]
)
def test_folder_without_results_is_refused(
    folder: Path, tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run/results.json").write_text(content)
    assert main(["card", str(folder), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "results.json" in error
    assert error.count("\n") == 1
