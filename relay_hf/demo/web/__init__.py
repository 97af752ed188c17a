"""The demo's page in the browser, `relay-hf demo --web`: a model with its relay and without, side by side."""

import importlib.util
from pathlib import Path

from ..arguments import WebArguments

__all__ = ["run_page"]


def run_page(model: str, arguments: WebArguments) -> None:
    """Loads a model and serves the page until the process is interrupted.

    Args:
        model: folder or Hub id of a relay model with its tokenizer.
        arguments: address to listen on.

    Raises:
        ImportError: the optional dependencies are missing.
        OSError: the address is taken, or the model cannot be read.
        ValueError: the model is no masked diffusion model.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("The page's dependencies are not installed: run `pip install 'relay-hf[web]'`.")
    from ...loading.checkpoint import load_for_decoding

    loaded = load_for_decoding(model)
    from .page import build_page, launch_page
    from .runs import Runner

    page = build_page(Runner(*loaded), Path(model).name)
    try:
        url = launch_page(page, arguments.host, arguments.port)
    except OSError as error:
        raise OSError(
            f"`{arguments.host}:{arguments.port}` cannot be listened on: give another `--host` or `--port`."
        ) from error
    print(f"relay-hf: `{model}` at {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()
