"""`relay-hf card`."""

from collections.abc import Sequence
from pathlib import Path

from .parser import make_parser, parse


def run(program: str, argv: Sequence[str]) -> None:
    """Writes evaluations into a model's card: table, picture and metadata. What people wrote into the card stays."""
    parser = make_parser(program, "FOLDER RUN [OTHER ...]", [], run.__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="the model, as `relay-hf train` or `save_pretrained` wrote it")
    parser.add_argument(
        "run", metavar="RUN", help="output folder of `relay-hf eval` on this model, or a file of the harness' results"
    )
    parser.add_argument("others", metavar="OTHER", nargs="*", help="those of models that it is compared with")
    (arguments,) = parse(parser, argv)
    runs = [Path(run) for run in (arguments.run, *arguments.others)]
    if len({run.is_file() for run in runs}) > 1:
        raise ValueError(
            f"`{' '.join(map(str, runs))}` are files and folders: give folders of `relay-hf eval`, or files of the "
            "harness."
        )
    # Not above: `--help` would wait for torch.
    from ..evaluation import add_results, add_runs

    add = add_results if runs[0].is_file() else add_runs
    print(add(Path(arguments.folder), runs))
