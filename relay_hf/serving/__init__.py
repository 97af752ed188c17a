"""An OpenAI-compatible server on transformers' own serving: `relay-hf serve PATH_OR_REPO`."""

import contextlib
import socket
from dataclasses import asdict

from .arguments import ServeArguments

__all__ = ["ServeArguments", "run_server"]


def run_server(model: str, arguments: ServeArguments) -> None:
    """Loads a model and answers requests until the process is interrupted.

    Args:
        model: folder or Hub id of a relay model with its tokenizer; `id@revision` names a revision.
        arguments: address to listen on, device, dtype and compilation.

    Raises:
        ImportError: the optional dependencies are missing.
        OSError: the address is taken, or the model cannot be read.
        ValueError: the model is no relay model.
    """
    # Not above: `--help` would wait for it.
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("The server's dependencies are not installed: run `pip install 'relay-hf[serve]'`.")
    import uvicorn

    from .server import build_app

    with _bind(arguments.host, arguments.port) as listener:
        options = asdict(arguments)
        del options["port"]
        app = build_app(model, **options)
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        port = listener.getsockname()[1]
        print(f"relay-hf: serving `{model}` at http://{host}:{port}/v1 (Ctrl-C ends it)", flush=True)
        # After five seconds, streams that are still running are cut off.
        config = uvicorn.Config(app, timeout_graceful_shutdown=5)
        # uvicorn shuts down in order, then raises the signal again.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def _bind(host: str, port: int) -> socket.socket:
    """Takes the address before the model is loaded, so that a taken one is noticed at once."""
    # TCP by name: else asyncio would not turn Nagle's algorithm off, and every answer would wait for 40 ms.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, proto=socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(
            f"`{host}:{port}` cannot be listened on ({error.strerror}): give another `--port` or `--host`."
        ) from error
    return listener
