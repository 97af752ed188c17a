import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoTokenizer

from relay_hf import RelayCache
from relay_hf.cli import main
from relay_hf.commands.conversation import Conversation
from relay_hf.loading.checkpoint import load_for_decoding

Chat = Callable[..., str]


@pytest.fixture
def chat(checkpoint: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """What `relay-hf chat` prints to stdout for some lines on stdin."""

    def run(*lines: str, argv: tuple[str, ...] = ()) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        assert main(["chat", str(checkpoint), "--max_new_tokens", "9", "--device", "cpu", *argv]) == 0
        return capsys.readouterr().out

    return run


def replies(checkpoint: Path, turns: list[str], system: str | None = None, **options: Any) -> list[str]:
    """What `generate` answers, each turn from nothing."""
    model, tokenizer = AutoModel.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, **{"max_new_tokens": 9, **options})
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_replies_equal_those_of_generate(chat: Chat, checkpoint: Path) -> None:
    turns = ["hello", "and then?", "why"]
    assert chat(*turns).splitlines() == replies(checkpoint, turns)


def test_options_and_system_message_reach_generate(chat: Chat, checkpoint: Path) -> None:
    options = ("--system", "be brief", "--do_sample", "--seed", "3", "--unmasking_threshold", "0.1")
    expected = replies(
        checkpoint, ["hello", "why"], "be brief", do_sample=True, sampling_seeds=[3], unmasking_threshold=0.1
    )
    assert chat("hello", "why", argv=options).splitlines() == expected


def test_clear_begins_anew_and_exit_ends(chat: Chat, checkpoint: Path) -> None:
    once = replies(checkpoint, ["hello"])
    assert chat("hello", "", "/clear", "hello", "/exit", "hello").splitlines() == once * 2


def test_unknown_command_is_told_and_not_sent(chat: Chat, capsys: pytest.CaptureFixture) -> None:
    assert chat("/dance") == ""


def test_committed_blocks_are_not_computed_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_for_decoding(str(checkpoint), device="cpu")
    lengths: list[int] = []
    generate = model.generate

    def spy(*args: Any, cache: RelayCache, **kwargs: Any) -> Any:
        lengths.append(cache.get_seq_length())
        return generate(*args, cache=cache, **kwargs)

    monkeypatch.setattr(model, "generate", spy)
    talk = Conversation(model, tokenizer, {"max_new_tokens": 9})
    talk.reply("hello")
    talk.reply("why")
    assert lengths[0] == 0
    assert lengths[1] >= 8
    talk.clear()
    talk.reply("hello")
    assert lengths[2] == 0


def test_terminal_sees_drafts(checkpoint: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_for_decoding(str(checkpoint), device="cpu")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    Conversation(model, tokenizer, {"max_new_tokens": 9}).reply("hello")
    assert "\033[33m" in capsys.readouterr().out


def test_interrupted_reply_has_not_happened(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_for_decoding(str(checkpoint), device="cpu")
    talk = Conversation(model, tokenizer, {"max_new_tokens": 9})
    talk.reply("hello")
    before = list(talk.messages)
    forward, calls = model.forward, []

    def stop(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", stop)
    talk.reply("why")
    assert talk.messages == before
    monkeypatch.setattr(model, "forward", forward)
    talk.reply("why")
    assert talk.messages[-1]["content"] == replies(checkpoint, ["hello", "why"])[-1]


def test_tokenizer_without_template_is_refused(checkpoint: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    AutoModel.from_pretrained(checkpoint).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    assert "has no chat template" in refuse("chat", tmp_path)
