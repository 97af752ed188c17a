"""`relay-hf prepare-data`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .parser import make_parser, parse


@dataclass
class PrepareArguments:
    """Arguments of the mixture; the defaults are the published ones."""

    code: str = field(
        default="nvidia/OpenCodeInstruct", metadata={"help": "Data set of code, or JSON lines with its columns."}
    )
    math: str = field(
        default="nvidia/OpenMathInstruct-2",
        metadata={"help": "Data set of mathematics, or JSON lines with its columns."},
    )
    code_split: str = field(default="train", metadata={"help": "Split of `code`, if it is on the Hub."})
    math_split: str = field(default="train_1M", metadata={"help": "Split of `math`, if it is on the Hub."})
    code_rows: int = field(default=24_000, metadata={"help": "Rows of code to keep."})
    math_rows: int = field(default=36_000, metadata={"help": "Rows of mathematics to keep."})
    model: str = field(
        default="Efficient-Large-Model/Fast_dLLM_v2_1.5B",
        metadata={"help": "The model to be trained, whose tokenizer and chat template measure the rows."},
    )
    max_tokens: int = field(default=2048, metadata={"help": "Longest conversation that is kept."})
    code_buffer: int = field(default=100_000, metadata={"help": "Rows among which the next row of code is drawn."})
    math_buffer: int = field(default=50_000, metadata={"help": "The same for mathematics."})
    seed: int = field(
        default=42, metadata={"help": "Of the order of code and of the mixture; mathematics has one more."}
    )

    def __post_init__(self) -> None:
        for name in ("code_rows", "math_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"`--{name}={getattr(self, name)}` must be at least 0.")
        for name in ("max_tokens", "code_buffer", "math_buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}={getattr(self, name)}` must be at least 1.")


def run(program: str, argv: Sequence[str]) -> None:
    """Makes the training data of the published recipe: 24 000 rows of code and 36 000 of mathematics."""
    parser = make_parser(program, "OUTPUT", PrepareArguments, run.__doc__)
    parser.add_argument("output", metavar="OUTPUT", help="file of JSON lines to write; must not exist")
    arguments, where = parse(parser, argv)
    # Not above: `--help` and refused options would wait for datasets.
    from .mixture import prepare_data, summarize_counts

    counts = prepare_data(where.output, arguments)
    for name, numbers in counts.items():
        print(f"{name}: {summarize_counts(numbers)}")
    print(f"{sum(numbers['kept'] for numbers in counts.values())} rows in `{where.output}`")
