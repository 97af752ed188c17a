"""`relay-hf traces`."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..startup.options import option, require_at_least
from .decoding_arguments import DecodingArguments, make_decoding_parser
from .parser import MODEL, parse

CHECKS = ("none", "answer", "tests", "sudoku")


@dataclass
class TracesArguments(DecodingArguments):
    """Arguments of `relay-hf traces`."""

    # A canvas is filled in, and nothing is appended unless asked for.
    max_new_tokens: int | None = option(None, "tokens to write at most [256]; on a canvas, beside its masks [0]", "N")
    dataset_name: str | None = option(None, "data set on the Hub, a folder, or a file of JSON lines, CSV or Parquet")
    dataset_config: str | None = option(None, "configuration of a data set on the Hub")
    dataset_split: str = option("train", "its split")
    limit: int | None = option(None, "only the first rows", "N")
    prompt_column: str = option("prompt", "column of the prompts: texts, or messages", "NAME")
    answer_column: str = option("answer", "column of the answers that --check=answer compares with", "NAME")
    check: str = option("none", "texts to keep: none (all), answer (equal), tests (pass), sudoku (legal)", "NAME")
    batch_size: int = option(8, "prompts that are answered at once", "N")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "limit", "batch_size")
        if self.dataset_name is None:
            raise ValueError("There are no prompts: give a data set in `--dataset_name`.")
        if self.check not in CHECKS:
            raise ValueError(f"`--check={self.check}` is unknown: choose one of {', '.join(CHECKS)}.")


def run(program: str, argv: Sequence[str]) -> None:
    """Lets a model answer prompts; writes rows for `objective=traces`: its texts, and when it revealed each token."""
    positionals = {**MODEL, "OUTPUT": "file of JSON lines to write; must not exist"}
    parser = make_decoding_parser(program, positionals, TracesArguments, run.__doc__)
    parser.add_argument("--raw", action="store_true", help="give prompts without the chat template")
    arguments, given = parse(parser, argv)
    arguments.do_sample = given.do_sample
    # Not above: `--help` and refused options would wait for torch.
    from .trace_files import write_traces

    print(write_traces(given.path_or_repo, given.output, arguments, given.raw))
