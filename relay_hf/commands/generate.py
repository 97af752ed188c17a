"""`relay-hf generate`."""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.forwards import FORWARDS
from ..startup.options import option
from .decoding_arguments import DecodingArguments, make_decoding_parser, parse_decoding
from .parser import MODEL


@dataclass
class GenerateArguments(DecodingArguments):
    """Arguments of `relay-hf generate`."""

    prompt_file: str | None = option(None, "file with the prompt", "FILE")


def run(program: str, argv: Sequence[str]) -> None:
    """Answers a prompt: the text goes to stdout, the number of forwards it took to stderr."""
    positionals = {**MODEL, "[PROMPT]": "the prompt; by default what comes in on stdin"}
    parser = make_decoding_parser(program, positionals, GenerateArguments, run.__doc__)
    parser.add_argument("--raw", action="store_true", help="give the prompt without the chat template")
    parser.add_argument(
        "--show_steps", "--show-steps", action="store_true", help="show on stderr what each forward reveals"
    )
    parser.add_argument("--json", action="store_true", help="print text and forwards as one line of JSON")
    arguments, given = parse_decoding(parser, argv)
    prompt = _read_prompt(given.prompt, arguments.prompt_file)
    # Not above: `--help` and refused options would wait for torch.
    from ..loading.checkpoint import load_for_decoding
    from ..loading.tokenizer import encode_prompt
    from ..pictures.timeline import show_denoising

    model, tokenizer = load_for_decoding(
        given.path_or_repo, arguments.revision, arguments.device, arguments.dtype, arguments.options
    )
    options = arguments.options(model.generation_config)
    inputs = encode_prompt(tokenizer, prompt, given.raw).to(model.device)
    output = model.generate(**inputs, **options, return_dict_in_generate=True, output_history=given.show_steps)
    written = output.sequences[0, inputs["input_ids"].shape[1] :]
    if given.show_steps:
        tokens = tokenizer.batch_decode(output.sequences[0][:, None])
        with contextlib.redirect_stdout(sys.stderr):
            show_denoising(output.history, tokens, skip_prompt=True)
    forwards = {name: int(getattr(output, name)[0]) for name in FORWARDS}
    text = tokenizer.decode(written, skip_special_tokens=True)
    if given.json:
        print(json.dumps({"text": text, "new_tokens": len(written), **forwards}, ensure_ascii=False))
    else:
        print(text)
        counts = ", ".join(f"{count} {name.removesuffix('_forwards')}" for name, count in forwards.items())
        print(f"{counts} forwards for {len(written)} tokens", file=sys.stderr)


def _read_prompt(given: str | None, file: str | None) -> str:
    """The prompt from where it was given: the command line, a file, or stdin."""
    if given is not None and file is not None:
        raise ValueError(f"There are two prompts, PROMPT and `--prompt_file={file}`: give one of them.")
    try:
        if file is not None:
            text = Path(file).read_text(encoding="utf-8")
        elif given is not None:
            text = given
        elif sys.stdin.isatty():
            raise ValueError("There is no prompt: give one behind the model, in `--prompt_file`, or on stdin.")
        else:
            text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"The prompt in {file or 'stdin'} is not text in UTF-8 ({error}): convert it.") from error
    if not text.strip():
        raise ValueError("The prompt is empty: give some text.")
    return text
