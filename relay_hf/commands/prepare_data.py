"""`relay-hf prepare-data`."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..startup.options import option, require_at_least
from .parser import make_parser, parse


@dataclass
class PrepareArguments:
    """Arguments of the mixture; the defaults are the published ones."""

    code: str = option("nvidia/OpenCodeInstruct", "Data set of code, or JSON lines with its columns.")
    math: str = option("nvidia/OpenMathInstruct-2", "Data set of mathematics, or JSON lines with its columns.")
    code_split: str = option("train", "Split of `code`, if it is on the Hub.")
    math_split: str = option("train_1M", "Split of `math`, if it is on the Hub.")
    code_rows: int = option(24_000, "Rows of code to keep.")
    math_rows: int = option(36_000, "Rows of mathematics to keep.")
    model: str = option(
        "Efficient-Large-Model/Fast_dLLM_v2_1.5B",
        "The model to be trained, whose tokenizer and chat template measure the rows.",
    )
    max_tokens: int = option(2048, "Longest conversation that is kept.")
    code_buffer: int = option(100_000, "Rows among which the next row of code is drawn.")
    math_buffer: int = option(50_000, "The same for mathematics.")
    seed: int = option(42, "Of the order of code and of the mixture; mathematics has one more.")

    def __post_init__(self) -> None:
        require_at_least(0, self, "code_rows", "math_rows")
        require_at_least(1, self, "max_tokens", "code_buffer", "math_buffer")


def run(program: str, argv: Sequence[str]) -> None:
    """Makes the training data of the published recipe: 24 000 rows of code and 36 000 of mathematics."""
    positionals = {"OUTPUT": "file of JSON lines to write; must not exist"}
    arguments, where = parse(make_parser(program, positionals, PrepareArguments, run.__doc__), argv)
    # Not above: `--help` and refused options would wait for datasets.
    from .mixture import prepare_data, summarize_counts

    counts = prepare_data(where.output, arguments)
    for name, numbers in counts.items():
        print(f"{name}: {summarize_counts(numbers)}")
    print(f"{sum(numbers['kept'] for numbers in counts.values())} rows in `{where.output}`")
