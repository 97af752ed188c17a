"""`relay-hf demo`."""

from collections.abc import Sequence

from ..demo import DemoArguments, run_demo
from ..demo.arguments import WebArguments, changed_fields
from ..demo.web import run_page
from .parser import make_parser, parse


def run(program: str, argv: Sequence[str]) -> None:
    """Trains Relay and its baselines on Sudoku and shows the saved model at work; `--web` opens a page on it."""
    arguments, web = parse(make_parser(program, {}, [DemoArguments, WebArguments], run.__doc__), argv)
    if web.web:
        run_page(_model_to_show(arguments, web), web)
    else:
        run_demo(arguments)


def _model_to_show(arguments: DemoArguments, web: WebArguments) -> str:
    """The model that was named, or the one that the demo has saved.

    Raises:
        ValueError: an option would have no effect.
        OSError: the demo has saved no model.
    """
    finding = ("size", "output_dir")
    if training := [name for name in changed_fields(arguments) if name not in finding]:
        raise ValueError(f"`--{training[0]}` is about training, but `--web` trains nothing: leave one of them out.")
    if web.model is not None and (found := changed_fields(arguments)):
        raise ValueError(f"`--{found[0]}` finds the demo's model, but `--model` names one: leave one of them out.")
    if web.model is not None:
        return web.model
    if not (arguments.model_folder / "config.json").is_file():
        raise OSError(
            f"`{arguments.model_folder}` holds no model yet: run `make demo` (or `relay-hf demo`), which trains one "
            "and saves it there, or name another with `--model`."
        )
    return str(arguments.model_folder)
