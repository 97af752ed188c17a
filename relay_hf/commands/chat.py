"""`relay-hf chat`."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..startup.options import option
from .decoding_arguments import DecodingArguments, make_decoding_parser, parse_decoding
from .parser import MODEL

HELP = "/clear begins a new conversation, /exit or Ctrl-D ends it, Ctrl-C stops a reply."


@dataclass
class ChatArguments(DecodingArguments):
    """Arguments of `relay-hf chat`."""

    system: str | None = option(None, "the system's message, which begins a conversation", "TEXT")


def run(program: str, argv: Sequence[str]) -> None:
    """Talks with a model in the terminal; drafts are shown while they are denoised."""
    parser = make_decoding_parser(program, MODEL, ChatArguments, run.__doc__)
    arguments, given = parse_decoding(parser, argv)
    # Not above: `--help` and refused options would wait for torch.
    from ..loading.checkpoint import load_for_decoding
    from .conversation import Conversation

    model, tokenizer = load_for_decoding(
        given.path_or_repo, arguments.revision, arguments.device, arguments.dtype, arguments.options
    )
    if tokenizer.chat_template is None:
        raise ValueError(f"`{given.path_or_repo}` has no chat template: ask it with `relay-hf generate`.")
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


def _read_line() -> str | None:
    """What the user types, without spaces around it; None at the end."""
    try:
        # A prompt would only be in the way of what is read from a pipe.
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
