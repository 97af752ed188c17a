"""What `relay-hf generate` and `relay-hf chat` let users choose about decoding."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from trl import TrlParser

from ..startup.options import option, require_at_least
from .parser import make_parser, unknown_option

if TYPE_CHECKING:
    from transformers import GenerationConfig


# Fields that are no options of `generate`.
NOT_OF_GENERATE = ("seed", "device", "dtype", "revision")


@dataclass
class DecodingArguments:
    """Options of `generate`, by default those of the model's `generation_config.json`.

    All options of `DecodingOptions` about unmasking are here, under the same names: that class would import torch.
    """

    max_new_tokens: int = option(256, "tokens to write at most", "N")
    unmasking_policy: str | None = option(None, "which positions a step reveals, e.g. confidence_threshold", "NAME")
    unmasking_threshold: float | None = option(None, "the number that the policy compares with", "X")
    denoising_steps: int | None = option(None, "steps that a block, or a sub-block, takes", "N")
    unmasking_order: str | None = option(None, "the order of fixed_count and time_schedule, e.g. margin", "NAME")
    unmasking_count: int | None = option(None, "positions that confidence_threshold reveals in any case", "U")
    confidence_top_k: int | None = option(None, "count only so many tokens of each distribution", "K")
    sub_block_size: int | None = option(None, "positions of a block that are revealed first", "N")
    use_sub_block_cache: bool | None = option(None, "true: keep the keys and values outside the sub-block", "BOOL")
    fuse_commits: bool | None = option(None, "true: commit a block in the first forward of the next one", "BOOL")
    use_relay: bool | None = option(None, "false: do not carry the relay state from step to step", "BOOL")
    relay_start: str | None = option(None, "self: start each block from a pass of the model itself", "NAME")
    # The parser adds it itself: it would let the prompt be the value of a switch before it.
    do_sample: bool | None = field(default=None, init=False)
    temperature: float | None = option(None, "temperature of the distribution that tokens are drawn from", "X")
    top_p: float | None = option(None, "draw among the tokens that make up this probability", "P")
    seed: int | None = option(None, "the same tokens are drawn whenever it is the same", "N")
    device: str = option(
        "auto", "where the model runs, e.g. cuda:0; by default an accelerator, if there is one", "NAME"
    )
    dtype: str = option("auto", "dtype of the weights, e.g. bfloat16; default: as they were saved", "NAME")
    revision: str | None = option(None, "branch, tag or commit of a model on the Hub", "NAME")

    def __post_init__(self) -> None:
        require_at_least(1, self, "max_new_tokens")

    def options(self, defaults: "GenerationConfig") -> dict[str, Any]:
        """The given options as keyword arguments of `generate`.

        Args:
            defaults: the model's generation config.

        Raises:
            ValueError: an option about drawing tokens was given, but decoding is greedy.
        """
        names = [field.name for field in fields(DecodingArguments) if field.name not in NOT_OF_GENERATE]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        draws = defaults.do_sample if self.do_sample is None else self.do_sample
        for name in ("temperature", "top_p", "seed"):
            if getattr(self, name) is not None and not draws:
                raise ValueError(
                    f"`--{name}={getattr(self, name)}` is about drawing tokens, but decoding is greedy: also give "
                    "`--do_sample`, or leave it out."
                )
        if self.seed is not None:
            given["sampling_seeds"] = [self.seed]
        return given


def make_decoding_parser(
    program: str, positionals: Mapping[str, str], arguments: type[DecodingArguments], description: str | None
) -> TrlParser:
    """A parser for a model, its decoding, and what the caller adds.

    Args:
        program, positionals, arguments, description: as in `make_parser`.
    """
    parser = make_parser(program, positionals, arguments, description)
    parser.add_argument(
        "--do_sample",
        "--do-sample",
        action=argparse.BooleanOptionalAction,
        help="draw tokens instead of taking the most probable ones",
    )
    return parser


def parse_decoding(parser: TrlParser, argv: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """The dataclass, and what was added to the parser.

    Raises:
        ValueError: an option is unknown.
    """
    arguments, given, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if rest and not rest[0].startswith("-") and getattr(given, "prompt", "") is None:
        given.prompt = rest.pop(0)  # argparse does not find it behind an option
    if rest:
        raise ValueError(unknown_option(parser, rest[0]))
    arguments.do_sample = given.do_sample
    return arguments, given
