"""`relay-hf chat`."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from transformers import TextDiffusionStreamer, TextStreamer

from ..checkpoint_loading import load_for_decoding
from ..modeling import RelayCache
from .decoding_arguments import DecodingArguments, make_decoding_parser, parse_decoding

HELP = "/clear begins a new conversation, /exit or Ctrl-D ends it, Ctrl-C stops a reply."


@dataclass
class ChatArguments(DecodingArguments):
    """Arguments of `relay-hf chat`."""

    system: str | None = field(
        default=None, metadata={"help": "the system's message, which begins a conversation", "metavar": "TEXT"}
    )


def run(program: str, argv: Sequence[str]) -> None:
    """Talks with a model in the terminal; drafts are shown while they are denoised."""
    parser = make_decoding_parser(program, "PATH_OR_REPO", ChatArguments, run.__doc__)
    arguments, given = parse_decoding(parser, argv)
    model, tokenizer = load_for_decoding(
        given.model, arguments.revision, arguments.device, arguments.dtype, arguments.options
    )
    if tokenizer.chat_template is None:
        raise ValueError(f"`{given.model}` has no chat template: ask it with `relay-hf generate`.")
    talk = Conversation(model, tokenizer, arguments.options(model.generation_config), arguments.system)
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # line editing and history for `input`
        print(HELP, file=sys.stderr)
    while (line := _read_line()) not in (None, "/exit"):
        if line == "/clear":
            talk.clear()
        elif line.startswith("/"):
            print(f"`{line}` is not a command. {HELP}", file=sys.stderr)
        elif line:
            talk.reply(line)


class Conversation:
    """Turns of a chat; what both turns begin with is computed once.

    Args:
        model, tokenizer: of `load_for_decoding`.
        options: keyword arguments of `generate`.
        system: the message that begins it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        options: dict[str, Any],
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.beginning: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.clear()

    def clear(self) -> None:
        """Forgets all turns."""
        self.messages = list(self.beginning)
        self.cache = RelayCache(config=self.model.config.text_config)

    def reply(self, text: str) -> None:
        """Prints a reply as it is written. Interrupted, the turn has not happened."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        # Drafts are overwritten by escape sequences, which only a terminal understands.
        kind = TextDiffusionStreamer if sys.stdout.isatty() else TextStreamer
        streamer = kind(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            output = self.model.generate(
                **prompt, **self.options, cache=self.cache, streamer=streamer, return_dict_in_generate=True
            )
        except KeyboardInterrupt:
            streamer.end()
            return
        written = output.sequences[0, prompt["input_ids"].shape[1] :]
        reply = self.tokenizer.decode(written, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": reply}]


def _read_line() -> str | None:
    """What the user types, without spaces around it; None at the end."""
    try:
        # A prompt would only be in the way of what is read from a pipe.
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
