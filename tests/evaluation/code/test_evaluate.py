"""A whole evaluation: through the command line with a random model, resumed, refused, and with answers that pass."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relay_hf.cli import main
from relay_hf.evaluation.code import CodeEvalArguments
from relay_hf.evaluation.code.answers import Answerer
from relay_hf.evaluation.code.chat_prompt import ChatPrompt
from relay_hf.evaluation.code.evaluate import evaluate_code
from relay_hf.evaluation.code.problems import load_problems
from relay_hf.evaluation.forwards import FORWARDS
from relay_hf.modeling import RelayGenerateOutput
from relay_hf.testing import all_tokens_but

from ..conftest import NAMES


@pytest.fixture
def arguments(benchmark: Path, tmp_path: Path) -> Callable[..., CodeEvalArguments]:
    def make(**options: Any) -> CodeEvalArguments:
        where = {"benchmark": str(benchmark), "output_dir": str(tmp_path / "out")}
        return CodeEvalArguments(**{**where, "max_new_tokens": 20, "batch_size": 2, "thresholds": [0.3], **options})

    return make


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_command_line_writes_answers_results_and_picture(
    model: Any, chat_tokenizer: Any, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model.save_pretrained(tmp_path / "tiny")
    chat_tokenizer.save_pretrained(tmp_path / "tiny")
    options = ["--benchmark", str(benchmark), "--output-dir", str(tmp_path / "out"), "--max-new-tokens", "20"]
    assert main(["eval", str(tmp_path / "tiny"), *options, "--thresholds", "0.1", "0.9", "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in printed[2:4]] == [["0.1", "0.0%", "0/5"], ["0.9", "0.0%", "0/5"]]

    answerer = Answerer(model, chat_tokenizer, 20, False, {}, ChatPrompt())
    problems = load_problems(str(benchmark))
    for threshold in (0.1, 0.9):
        samples = lines(tmp_path / f"out/samples_threshold_{threshold}.jsonl")
        # What a row costs and writes is what it does alone.
        for sample, problem in zip(samples, problems, strict=True):
            alone = answerer([problem], threshold)[0]
            assert (sample["task_id"], sample["answer"]) == (problem.task_id, alone.text)
            assert [sample[name] for name in (*FORWARDS, "new_tokens")] == list(vars(alone).values())[1:]
    report = json.loads((tmp_path / "out/results.json").read_text())
    cautious = report["results"][1]["row"]
    assert (cautious["threshold"], cautious["metrics"], cautious["samples"]) == (0.9, {"pass@1": 0.0}, 5)
    for name in FORWARDS:
        assert cautious[name] == sum(sample[name] for sample in samples) / 5
    assert cautious["denoise_forwards"] > report["results"][0]["row"]["denoise_forwards"]
    assert report["results"][1]["forwards_per_token"]["commit_forwards"] == cautious["commit_forwards"] / 20
    assert report["settings"]["model"] == "tiny"
    assert (tmp_path / "out/accuracy_against_forwards.png").read_bytes().startswith(b"\x89PNG")


def test_samples_are_what_evalplus_reads(model: Any, chat_tokenizer: Any, arguments: Any, tmp_path: Path) -> None:
    evaluate_code(model, chat_tokenizer, arguments())
    path = tmp_path / "out/samples_threshold_0.3.jsonl"
    assert path.read_bytes().endswith(b"\n")
    for sample, name in zip(lines(path), NAMES, strict=True):
        # `evalplus.data.load_solutions`: the names are those of its problems, and no "completion" is in the way.
        assert sample["task_id"] == f"HumanEval/{NAMES.index(name)}"
        assert isinstance(sample["solution"], str)
        assert "completion" not in sample


def test_run_that_was_killed_resumes_to_the_same_file(
    model: Any, chat_tokenizer: Any, arguments: Any, tmp_path: Path
) -> None:
    evaluate_code(model, chat_tokenizer, arguments())
    path = tmp_path / "out/samples_threshold_0.3.jsonl"
    content, results = path.read_bytes(), (tmp_path / "out/results.json").read_bytes()
    for left in (0.1, 0.45, 0.99):
        path.write_bytes(content[: int(left * len(content))])
        (tmp_path / "out/results.json").unlink()
        evaluate_code(model, chat_tokenizer, arguments())
        assert (path.read_bytes(), (tmp_path / "out/results.json").read_bytes()) == (content, results)


def test_longest_problems_are_answered_first_and_the_file_has_their_order(
    model: Any, chat_tokenizer: Any, arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, widths = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **o: widths.append(o["input_ids"].shape[1]) or generate(**o))
    evaluate_code(model, chat_tokenizer, arguments())
    assert len(widths) == 3
    assert widths == sorted(widths, reverse=True)
    path = tmp_path / "out/samples_threshold_0.3.jsonl"
    assert [sample["task_id"] for sample in lines(path)] == [f"HumanEval/{number}" for number in range(5)]
    assert [file.name for file in path.parent.glob("samples_*")] == [path.name]


def test_file_of_an_interrupted_run_in_another_order_resumes(
    model: Any, chat_tokenizer: Any, arguments: Any, tmp_path: Path
) -> None:
    """Earlier versions answered the problems in their order; the rest is answered, whatever it is."""
    evaluate_code(model, chat_tokenizer, arguments())
    path = tmp_path / "out/samples_threshold_0.3.jsonl"
    content = path.read_bytes()
    path.write_bytes(b"".join(content.splitlines(keepends=True)[:2]))
    evaluate_code(model, chat_tokenizer, arguments())
    assert path.read_bytes() == content


def test_thresholds_that_differ_in_a_late_digit_have_files_of_their_own(
    model: Any, chat_tokenizer: Any, arguments: Any, tmp_path: Path
) -> None:
    evaluate_code(model, chat_tokenizer, arguments(thresholds=[0.3, 0.30000001, 1.0]))
    names = sorted(path.name for path in (tmp_path / "out").glob("samples_*"))
    assert names == [f"samples_threshold_{name}.jsonl" for name in ("0.3", "0.30000001", "1")]


def test_finished_run_is_only_read_again(
    model: Any, chat_tokenizer: Any, arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate_code(model, chat_tokenizer, arguments())
    monkeypatch.setattr(model, "generate", lambda **options: pytest.fail("it decoded"))
    assert evaluate_code(model, chat_tokenizer, arguments()) == first


@pytest.mark.parametrize("change", ["option", "weights", "problems"])
def test_folder_of_another_evaluation_raises(
    model: Any, chat_tokenizer: Any, arguments: Any, benchmark: Path, change: str
) -> None:
    evaluate_code(model, chat_tokenizer, arguments())
    if change == "weights":
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
    if change == "problems":
        benchmark.write_text(benchmark.read_text().replace("== 1", "== 2"))
    with pytest.raises(ValueError, match=f"{'batch_size: 2, now 4' if change == 'option' else change}.*--output_dir"):
        evaluate_code(model, chat_tokenizer, arguments(batch_size=4 if change == "option" else 2))


def test_second_run_in_a_folder_raises(
    model: Any, chat_tokenizer: Any, arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = model.generate

    def run_again(**options: Any) -> RelayGenerateOutput:
        with pytest.raises(ValueError, match=r"Another run writes to `.*out`: let it end"):
            evaluate_code(model, chat_tokenizer, arguments(thresholds=[0.5]))
        return generate(**options)

    monkeypatch.setattr(model, "generate", run_again)
    evaluate_code(model, chat_tokenizer, arguments(limit=1))


def test_folder_without_answers_is_taken_over(model: Any, chat_tokenizer: Any, arguments: Any) -> None:
    with pytest.raises(ValueError, match="sub_block_siez"):
        evaluate_code(model, chat_tokenizer, arguments(generation_options='{"sub_block_siez": 4}'))
    evaluate_code(model, chat_tokenizer, arguments(generation_options='{"sub_block_size": 4}'))


def answers_right(chat_tokenizer: Any) -> Callable[..., RelayGenerateOutput]:
    """A `generate` that knows every answer but that to `neg`, of which it writes all letters."""

    def generate(input_ids: torch.Tensor, **options: Any) -> RelayGenerateOutput:
        rows = []
        for prompt in chat_tokenizer.batch_decode(input_ids):
            name = next(name for name in NAMES if f"def {name}(" in prompt)
            text = f"def {name}(a, b):\n    return {'-a' if name == 'neg' else 'a'}\n```\nDone."
            rows.append(chat_tokenizer(text)["input_ids"])
        counts = torch.tensor([len(row) for row in rows])
        new = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        return RelayGenerateOutput(
            sequences=torch.cat([input_ids, new], 1),
            denoise_forwards=counts - 4,
            commit_forwards=torch.full_like(counts, 3),
            prefill_forwards=torch.ones_like(counts),
            tokens_per_forward=counts / counts,
        )

    return generate


def test_right_answers_pass_and_wrong_ones_fail(
    model: Any, chat_tokenizer: Any, arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "generate", answers_right(chat_tokenizer))
    (result,) = evaluate_code(model, chat_tokenizer, arguments())
    assert result.accuracy == 0.8
    samples = lines(tmp_path / "out/samples_threshold_0.3.jsonl")
    assert [sample["reason"] for sample in samples] == ["passed"] * 3 + ["AssertionError", "passed"]
    assert samples[0]["solution"] == "def add(a, b):\n    return a"
    assert (samples[3]["new_tokens"], samples[3]["denoise_forwards"]) == (38, 34)


def test_prompt_asks_in_the_given_words_and_opens_the_answer(model: Any, chat_tokenizer: Any, benchmark: Path) -> None:
    answerer = Answerer(model, chat_tokenizer, 8, False, {}, ChatPrompt("Write it:", "Here:"))
    assert answerer.prompt(load_problems(str(benchmark))[0]) == (
        'user: Write it:\n```\ndef add(a, b):\n    """add a, b"""\n```\n\nassistant: Here:\n```python\n'
    )


def test_stop_at_fence_ends_an_answer_with_its_code(model: Any, chat_tokenizer: Any, benchmark: Path) -> None:
    problems = load_problems(str(benchmark))
    model.generation_config.suppress_tokens = all_tokens_but(chat_tokenizer, "\n`")
    model.generation_config.unmasking_threshold = 1.0
    free, stopped = (
        Answerer(model, chat_tokenizer, 60, stop, {}, ChatPrompt())(problems, 1.0) for stop in (False, True)
    )
    for long, short in zip(free, stopped, strict=True):
        assert short.text == long.text[: long.text.find("\n```") + 4 if "\n```" in long.text else None]
    assert sum(answer.denoise_forwards for answer in stopped) < sum(answer.denoise_forwards for answer in free)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": [0.5, 1.5]}, "`unmasking_threshold=1.5` is not a probability"),
        ({"max_new_tokens": 600}, r"`--max_new_tokens=600` more exceed the model's 640 positions: lower it to \d+"),
        ({"benchmark": "nowhere.jsonl"}, "`nowhere.jsonl` is no benchmark"),
    ],
)
def test_what_does_not_fit_raises_before_decoding(
    model: Any, chat_tokenizer: Any, arguments: Any, tmp_path: Path, options: dict, message: str
) -> None:
    model.generate = lambda **options: pytest.fail("it decoded")
    with pytest.raises((ValueError, OSError), match=message):
        evaluate_code(model, chat_tokenizer, arguments(**options))
    assert not (tmp_path / "out").exists()


def test_tokenizer_without_chat_template_raises(model: Any, tokenizer: Any, arguments: Any) -> None:
    with pytest.raises(ValueError, match=r"no chat template: set `tokenizer.chat_template`"):
        evaluate_code(model, tokenizer, arguments())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`--batch_size=0` must be at least 1"),
        ({"limit": 0}, "`--limit=0` must be at least 1"),
        ({"generation_options": "use_relay"}, "is not JSON"),
        ({"generation_options": "[]"}, "must be a JSON object"),
        ({"generation_options": '{"pad_token_id": 0}'}, r"sets \['pad_token_id'\], which the evaluation decides"),
        ({"generation_options": '{"do_sample": true}'}, r"sets \['do_sample'\], which the evaluation decides"),
        ({"thresholds": [0.5, 0.5]}, "names one twice"),
        ({"time_limit": 0.0}, "leaves nothing to run in"),
    ],
)
def test_bad_argument_raises(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodeEvalArguments(**options)


@pytest.mark.parametrize(
    ("model_name", "message"),
    [("nowhere", "nowhere"), ("plain", "no tokenizer"), ("decoder", "names no [MASK]")],
)
def test_command_line_unusable_model_is_one_sentence(
    model: Any, chat_tokenizer: Any, tmp_path: Path, model_name: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    model.save_pretrained(tmp_path / "plain")
    model.config.text_config.save_pretrained(tmp_path / "decoder")
    chat_tokenizer.save_pretrained(tmp_path / "decoder")
    assert main(["eval", str(tmp_path / model_name), "--output-dir", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("relay-hf: error: ")
    assert message in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--thresholds", "0.5", "7"], "unmasking_threshold=7.0"),
        (["--generation_options", '{"sub_block_size": 3}'], "does not divide"),
        (["--generation_options", '{"unmaskingpolicy": "x"}'], r"`generate` does not take ['unmaskingpolicy']"),
    ],
)
def test_senseless_option_is_told_before_weights_are_read(
    options: list[str], message: str, model: Any, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model.config.save_pretrained(tmp_path / "tiny")
    output = tmp_path / "out"
    command = ["eval", str(tmp_path / "tiny"), "--benchmark", str(benchmark), "--output_dir", str(output)]
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_options_are_checked_as_they_will_be_used(
    model: Any, chat_tokenizer: Any, benchmark: Path, tmp_path: Path
) -> None:
    """A checkpoint that draws tokens is asked greedily, and the result is a dictionary, which can hold a history."""
    model.generation_config.update(do_sample=True, t_max=2.0, t_min=0.5)
    model.save_pretrained(tmp_path / "tiny")
    chat_tokenizer.save_pretrained(tmp_path / "tiny")
    options = ["--benchmark", str(benchmark), "--output_dir", str(tmp_path / "out"), "--max_new_tokens", "4"]
    assert main(["eval", str(tmp_path / "tiny"), *options, "--generation_options", '{"output_history": true}']) == 0
