"""`relay-hf convert`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..startup.options import option
from .parser import make_parser, parse


@dataclass
class ConvertArguments:
    """Arguments of the conversion; what is not given stays as the source has it."""

    gguf_file: str | None = option(None, "Name of a GGUF file in the source to read.")
    mask_token_id: int | None = option(None, "Id of [MASK]; by default the source's own, else an unused or a new one.")
    block_size: int | None = option(
        None, "Positions denoised together; 0: the whole sequence. Default of decoders: 32."
    )
    token_shift: bool | None = option(None, "Whether the raw head scores the next token; decoders: true.")
    relay_channel: str | None = option(None, "What is carried between steps, e.g. none.")
    dtype: str | None = option(None, "Dtype to save in, e.g. bfloat16; default: the source's.")
    revision: str | None = option(None, "Branch, tag or commit of a source on the Hub.")

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 0:
            raise ValueError(f"`--block-size={self.block_size}` must be at least 1, or 0 for the whole sequence.")

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `convert` that were given."""
        given: dict[str, Any] = {name: value for name, value in asdict(self).items() if value is not None}
        if self.block_size == 0:
            given["block_size"] = None
        return given


def run(program: str, argv: Sequence[str]) -> None:
    """Makes a relay model of a causal decoder, Fast-dLLM v2, SDAR, LLaDA or Dream."""
    positionals = {
        "SOURCE": "the checkpoint: a folder, a GGUF file, or a repository of the Hub",
        "OUTPUT": "folder to write; must not exist, or be empty",
    }
    arguments, where = parse(make_parser(program, positionals, ConvertArguments, run.__doc__), argv)
    # Not above: `--help` and refused options would wait for torch.
    from ..conversion import convert

    print(convert(where.source, where.output, **arguments.options()))
