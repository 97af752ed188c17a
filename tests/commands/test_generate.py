import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoTokenizer

from relay_hf import RelayGenerateOutput
from relay_hf.cli import main
from relay_hf.commands.decoding_arguments import DecodingArguments

from ..conftest import text_config

PROMPT = "hello there"


def generate(checkpoint: Path, prompt: str, raw: bool = False, **options: Any) -> tuple[RelayGenerateOutput, str]:
    """What the library itself writes."""
    model, tokenizer = AutoModel.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    text = prompt if raw else f"U:{prompt};A:"
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, **{"max_new_tokens": 20, **options}, return_dict_in_generate=True)
    return output, tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def run(capsys: pytest.CaptureFixture, *argv: Any) -> tuple[str, str]:
    """stdout and stderr of `relay-hf generate`."""
    capsys.readouterr()
    assert main(["generate", *map(str, argv), "--max_new_tokens", "20", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_gguf_file_in_place_of_a_model_names_convert(refuse: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.touch()
    for given in (file, tmp_path):
        assert f"run `relay-hf convert {file} FOLDER`" in refuse("generate", given, "hi")


def test_text_and_forwards_equal_those_of_generate(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    output, text = generate(checkpoint, PROMPT)
    out, err = run(capsys, checkpoint, PROMPT)
    assert out == text + "\n"
    counts = [int(n) for n in (output.denoise_forwards, output.commit_forwards, output.prefill_forwards)]
    assert "{} denoise, {} commit, {} prefill forwards for 20 tokens".format(*counts) in err


def test_json_is_one_line_of_text_and_forwards(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    output, text = generate(checkpoint, PROMPT)
    told = json.loads(run(capsys, checkpoint, PROMPT, "--json")[0])
    assert told == {
        "text": text,
        "new_tokens": 20,
        "denoise_forwards": int(output.denoise_forwards),
        "commit_forwards": int(output.commit_forwards),
        "prefill_forwards": int(output.prefill_forwards),
    }


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["--unmasking_threshold", "0.01"], {"unmasking_threshold": 0.01}),
        (["--unmasking_policy", "fixed_count", "--unmasking_threshold", "2"],
         {"unmasking_policy": "fixed_count", "unmasking_threshold": 2.0}),
        (["--sub_block_size", "1"], {"sub_block_size": 1}),
        (["--use_relay", "false"], {"use_relay": False}),
        (["--denoising_steps", "2"], {"denoising_steps": 2}),
        (["--unmasking_policy", "time_schedule", "--denoising_steps", "3", "--unmasking_order", "margin"],
         {"unmasking_policy": "time_schedule", "denoising_steps": 3, "unmasking_order": "margin"}),
        (["--confidence_top_k", "2"], {"confidence_top_k": 2}),
        (["--fuse_commits", "true"], {"fuse_commits": True}),
        (["--relay_start", "self"], {"relay_start": "self"}),
        (["--do_sample", "--seed", "5"], {"do_sample": True, "sampling_seeds": [5]}),
        (["--do_sample", "--seed", "5", "--temperature", "3"],
         {"do_sample": True, "sampling_seeds": [5], "temperature": 3.0}),
        (["--do_sample", "--seed", "5", "--top_p", "0.1"], {"do_sample": True, "sampling_seeds": [5], "top_p": 0.1}),
    ],
)  # fmt: skip
def test_option_reaches_generate(
    argv: list[str], options: dict[str, Any], checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    def result(**options: Any) -> tuple[str, int, int]:
        output, text = generate(checkpoint, PROMPT, **options)
        return text, int(output.denoise_forwards), int(output.commit_forwards)

    told = json.loads(run(capsys, checkpoint, PROMPT, "--json", *argv)[0])
    assert (told["text"], told["denoise_forwards"], told["commit_forwards"]) == result(**options)
    assert result(**options) != result()


def test_raw_prompt_gets_no_chat_template(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(capsys, checkpoint, PROMPT, "--raw")[0] == generate(checkpoint, PROMPT, raw=True)[1] + "\n"
    assert generate(checkpoint, PROMPT, raw=True)[1] != generate(checkpoint, PROMPT)[1]


def test_prompt_comes_from_file_or_stdin(
    checkpoint: Path, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(capsys, checkpoint, PROMPT)
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert run(capsys, checkpoint, "--prompt_file", tmp_path / "prompt.txt")[0] == expected[0]
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert run(capsys, checkpoint)[0] == expected[0]


def test_show_steps_leaves_stdout_to_the_text(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    output, text = generate(checkpoint, PROMPT)
    out, err = run(capsys, checkpoint, PROMPT, "--show_steps")
    assert out == text + "\n"
    assert f"{int(output.denoise_forwards)}  " in err
    assert text.replace("\n", "") in err


def test_dtype_is_that_of_the_weights(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from relay_hf.loading.checkpoint import load_for_decoding

    assert str(load_for_decoding(str(checkpoint), dtype="bfloat16")[0].lm_head.weight.dtype) == "torch.bfloat16"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{model}", "hi", "--temperature", "2"], "`--temperature=2.0` is about drawing tokens"),
        (["{model}", "hi", "--seed", "2"], "`--seed=2` is about drawing tokens"),
        (["{model}", "hi", "--unmasking_policy", "magic"], "magic"),
        (["{model}", "hi", "--max_new_tokens", "0"], "`--max_new_tokens=0` must be at least 1"),
        (["{model}", "hi", "--dtype", "float7"], "`dtype=float7` is unknown"),
        (["{model}", "hi", "--device", "toaster"], "`device=toaster` is unknown"),
        (["{model}", "hi", "--device", "mps:0"], "`device=mps:0` is not available"),
        (["{model}", "hi", "--prompt_file", "nowhere"], "two prompts"),
        (["{model}", "--prompt_file", "nowhere"], "`nowhere` cannot be read or written (No such file or directory)"),
        (["{model}", "--prompt_file", "{latin}"], "not text in UTF-8"),
        (["{model}", "hi", "--do_sample", "--top_p", "1.5"], "`top_p=1.5` is not a probability"),
        (["{model}", " "], "The prompt is empty"),
        (["{model}", "hi", "--relay_start", "reference"], "carries hidden states: choose 'self'"),
        (["{model}", "hi", "--denoising_steps", "0"], "`denoising_steps=0` is not a whole number >= 1"),
        (["{model}", "hi", "--magic"], "`--magic` is not an option of `relay-hf generate`"),
        (["{model}", "hi", "--unmasking-treshold", "0.5"], "did you mean `unmasking_threshold`?"),
        (["{model}", "hi", "there"], "`there` is not an option"),
        (["{model}", "--raw", "hi", "there"], "`there` is not an option"),
        (["nobody/nothing", "hi"], "`nobody/nothing` is not a model"),
        (["{plain}", "hi"], "names no [MASK]"),
        (["{broken}", "hi"], "the file is damaged, get it again"),
        (["{mute}", "hi"], "no tokenizer"),
    ],
)
def test_bad_argument_is_one_sentence_and_exit_code_2(
    argv: list[str], message: str, checkpoint: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    text_config().save_pretrained(tmp_path / "plain")
    AutoModel.from_pretrained(checkpoint).config.save_pretrained(tmp_path / "mute")
    (tmp_path / "latin").write_bytes("ä".encode("latin-1"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    places = {name: tmp_path / name for name in ("plain", "mute", "latin", "broken")} | {"model": checkpoint}
    assert message in refuse("generate", *[text.format(**places) for text in argv])


def test_no_prompt_in_a_terminal_is_told(
    checkpoint: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert "There is no prompt" in refuse("generate", checkpoint)


def test_options_leave_the_defaults_of_the_model_alone(checkpoint: Path) -> None:
    defaults = AutoModel.from_pretrained(checkpoint).generation_config
    assert DecodingArguments().options(defaults) == {"max_new_tokens": 256}
    defaults.do_sample = True
    assert DecodingArguments(seed=1).options(defaults) == {"max_new_tokens": 256, "sampling_seeds": [1]}
    greedy = DecodingArguments()
    greedy.do_sample = False
    assert greedy.options(defaults)["do_sample"] is False


@pytest.mark.parametrize("switch", ["--json", "--raw", "--show-steps", "--do_sample", "--no-do_sample"])
def test_switch_does_not_take_the_prompt_for_its_value(
    switch: str, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(capsys, checkpoint, switch, PROMPT)[0]


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--unmasking_threshold", "7"], "unmasking_threshold=7.0"),
        (["--sub_block_size", "3"], "does not divide the model's"),
        (["--do_sample", "--top_p", "2"], "`top_p=2.0` is not a probability"),
        (["--unmasking_policy", "guess"], "guess"),
    ],
)
def test_senseless_option_is_told_before_weights_are_read(
    command: str, argv: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "without weights"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    prompt = [PROMPT] if command == "generate" else []
    assert main([command, str(folder), *prompt, *argv]) == 2
    assert message in capsys.readouterr().err
