"""What does decoding requests side by side bring? `relay-hf serve` against itself with one request at a time.

    python benchmarks/serving.py                       # a small model with blocks of 8
    python benchmarks/serving.py --block_size 32       # with longer blocks, whose forwards keep a CPU busier

Two servers run in processes of their own, `--max_batch_size 16` and `--max_batch_size 1`, on as many threads each as
the machine has cores. In turns, 1, 4 and 16 clients ask one of them over HTTP: each streams `--requests` replies, one
after the other, to prompts of different lengths. Reported are medians over the rounds, with the lowest and the highest:

- tokens per second of all clients together, and the same per second of the server's processor time, which depends
  less on what else the machine is doing;
- seconds until a client has the first block of a reply, waiting included.

Weights are random and the final norm is multiplied by `--sharpness`, so that a step reveals several tokens, as
published checkpoints do. Batches pay where a forward of one row leaves the machine idle: where starting operations or
reading weights takes longer than computing. The last line is one JSON object.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from transformers import Qwen2Config

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.testing import byte_tokenizer

CLIENTS = (1, 4, 16)
BATCH_SIZES = {"side by side": 16, "one at a time": 1}


def save_model(folder: Path, options: argparse.Namespace) -> None:
    """Writes a random model that reveals several tokens a step, with its tokenizer."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=options.hidden_size, intermediate_size=4 * options.hidden_size,
        num_hidden_layers=options.layers, num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=options.hidden_size // 128, max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = RelayConfig(
        text_config=text, block_size=options.block_size, mask_token_id=tokenizer.mask_token_id, token_shift=True
    )
    model = RelayForMaskedDiffusion(config)
    with torch.no_grad():
        model.model.norm.weight *= options.sharpness
        model.relay.norm.weight.normal_(std=0.02)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def serving(folder: Path, batch_size: int, threads: int) -> Iterator[tuple[psutil.Process, str]]:
    """A server in a process of its own, and its address."""
    log = folder / f"batch_{batch_size}.txt"
    command = [sys.executable, "-m", "relay_hf", "serve", folder, "--port", "0", "--device", "cpu"]
    # Threads that wait do not spin, because clients and the other server need the cores, too.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--max_batch_size", str(batch_size)], stdout=output, stderr=output, env=environment
        )
    try:
        while "startup complete" not in (text := log.read_text()):
            if server.poll() is not None:
                raise RuntimeError(text)
            time.sleep(0.2)
        address = re.search(r"http://\S+/v1", text)
        assert address is not None
        yield psutil.Process(server.pid), address[0]
    finally:
        server.terminate()
        server.wait(30)


@dataclass
class Run:
    """What one round of some clients came to.

    Args:
        tokens: of all replies.
        seconds: from the first request to the end of the last reply.
        processor_seconds: of the server meanwhile.
        first_block: seconds from each request to the first block of its reply.
    """

    tokens: int
    seconds: float
    processor_seconds: float
    first_block: list[float]


async def ask(http: httpx.AsyncClient, address: str, prompt: str, new_tokens: int) -> tuple[float, int]:
    """Streams a reply: seconds until its first text, and its tokens."""
    began, first, tokens = time.perf_counter(), 0.0, 0
    body = {"prompt": prompt, "max_tokens": new_tokens, "stream": True}
    async with http.stream("POST", f"{address}/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - began
                usage = json.loads(line.removeprefix("data: ")).get("usage")
                tokens = usage["completion_tokens"] if usage else tokens
    return first, tokens


async def drive(address: str, clients: int, options: argparse.Namespace) -> list[tuple[float, int]]:
    """What `ask` returns for every request."""

    async def client(number: int) -> list[tuple[float, int]]:
        answers = []
        for n in range(options.requests):
            prompt = "abcdefghij " * (1 + (3 * number + 5 * n) % 8)
            answers.append(await ask(http, address, f"{number}.{n}: {prompt}", options.new_tokens))
        return answers

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as http:
        return [answer for answers in await asyncio.gather(*map(client, range(clients))) for answer in answers]


def measure(server: tuple[psutil.Process, str], clients: int, options: argparse.Namespace) -> Run:
    process, address = server
    before, began = sum(process.cpu_times()[:2]), time.perf_counter()
    answers = asyncio.run(drive(address, clients, options))
    seconds, processor = time.perf_counter() - began, sum(process.cpu_times()[:2]) - before
    return Run(sum(tokens for _, tokens in answers), seconds, processor, [first for first, _ in answers])


def spread(numbers: list[float]) -> dict[str, float]:
    return {"median": statistics.median(numbers), "lowest": min(numbers), "highest": max(numbers)}


def summary(runs: list[Run]) -> dict[str, Any]:
    """The numbers of one server and one number of clients, over the rounds."""
    return {
        "tokens_per_second": spread([run.tokens / run.seconds for run in runs]),
        "tokens_per_processor_second": spread([run.tokens / run.processor_seconds for run in runs]),
        "first_block_seconds": spread([statistics.median(run.first_block) for run in runs]),
    }


def table(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Markdown: a line for each number of clients."""
    lines = ["| clients | number | side by side | one at a time | ratio |", "| --- | --- | --- | --- | --- |"]
    both, one = results.values()
    for clients in both:
        for name in both[clients]:
            ours, theirs = both[clients][name], one[clients][name]
            cells = [f"{n['median']:.3g} ({n['lowest']:.3g} to {n['highest']:.3g})" for n in (ours, theirs)]
            ratio = ours["median"] / theirs["median"]
            lines.append(f"| {clients} | {name.replace('_', ' ')} | {' | '.join(cells)} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--block_size", type=int, default=8)
    parser.add_argument("--sharpness", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    options = parser.parse_args()
    runs: dict[str, dict[int, list[Run]]] = {name: {n: [] for n in options.clients} for name in BATCH_SIZES}
    with tempfile.TemporaryDirectory() as name:
        save_model(Path(name), options)
        one, many = BATCH_SIZES["one at a time"], BATCH_SIZES["side by side"]
        with (
            serving(Path(name), many, options.threads) as batching,
            serving(Path(name), one, options.threads) as single,
        ):
            servers = {"side by side": batching, "one at a time": single}
            for server in servers.values():
                measure(server, 2, argparse.Namespace(requests=1, new_tokens=options.new_tokens))
            for _ in range(options.rounds):
                for clients in options.clients:
                    for name, server in servers.items():
                        runs[name][clients].append(measure(server, clients, options))
    results = {name: {n: summary(of) for n, of in by_clients.items()} for name, by_clients in runs.items()}
    print(table(results))
    machine = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps({"options": vars(options), **machine, "load": os.getloadavg(), "results": results}))


if __name__ == "__main__":
    main()
