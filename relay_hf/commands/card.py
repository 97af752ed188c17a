"""`relay-hf card`."""

from collections.abc import Sequence
from pathlib import Path

from .parser import make_parser, parse


def run(program: str, argv: Sequence[str]) -> None:
    """Writes evaluations into a model's card: table, picture and metadata. What people wrote into the card stays."""
    positionals = {
        "FOLDER": "the model, as `relay-hf train` or `save_pretrained` wrote it",
        "RUN": "output folder of `relay-hf eval` on this model, or a file of the harness' results",
        "[OTHER ...]": "those of models that it is compared with",
    }
    (where,) = parse(make_parser(program, positionals, [], run.__doc__), argv)
    runs = [Path(run) for run in (where.run, *where.other)]
    if len({run.is_file() for run in runs}) > 1:
        raise ValueError(
            f"`{' '.join(map(str, runs))}` are files and folders: give folders of `relay-hf eval`, or files of the "
            "harness."
        )
    # Not above: `--help` would wait for torch.
    from ..evaluation import add_results, add_runs

    add = add_results if runs[0].is_file() else add_runs
    print(add(Path(where.folder), runs))
