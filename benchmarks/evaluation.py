"""What batches save in an evaluation: requests per second and forwards, one request at a time against batches.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --threads 2 --batch 32 --questions 32

Two kinds of requests, as the tasks of lm-evaluation-harness have them: log-likelihoods of four choices per question, of
1 to 6 tokens behind a context of 40 to 93, and greedy answers of 64 tokens to the same contexts. The two ways take
turns in one process. A forward counts as one whatever its rows: a CPU takes about as long for the rows of many as for
many of few, but an accelerator is idle in a forward of few. The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from decode_workload import build_model, generate, make_prompts

from relay_hf import RelayForMaskedDiffusion
from relay_hf.evaluation import LikelihoodBound

Request = tuple[list[int], list[int]]


def choices(contexts: list[torch.Tensor], vocabulary: int) -> list[Request]:
    """Four continuations of each context, of 1 to 6 tokens."""
    generator = torch.Generator().manual_seed(2)
    return [
        (context.tolist(), torch.randint(0, vocabulary, (1 + (number + choice) % 6,), generator=generator).tolist())
        for number, context in enumerate(contexts)
        for choice in range(4)
    ]


def measure(
    model: RelayForMaskedDiffusion, ways: dict[str, Callable[[], object]], requests: int, turns: int
) -> dict[str, dict[str, float]]:
    """Requests per second (median of the turns) and forwards of each way, which take turns."""
    forwards = [0]
    hook = model.register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    counts = {}
    for _ in range(1 + turns):
        for name, run in ways.items():
            forwards[0], began = 0, time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
            counts[name] = forwards[0]
    hook.remove()
    return {
        name: {"requests_per_second": requests / median(taken[1:]), "forwards": counts[name]}
        for name, taken in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = build_model("small")
    contexts = make_prompts(model, arguments.questions, ragged=True)
    requests = choices(contexts, model.config.mask_token_id)
    longest_first = sorted(contexts, key=len, reverse=True)

    def bound(size: int) -> None:
        list(LikelihoodBound(model, batch_size=size)(requests))

    def answer(size: int) -> None:
        for first in range(0, len(contexts), size):
            generate(model, longest_first[first : first + size], 64)

    result = {}
    for kind, run, count in (("log-likelihoods", bound, len(requests)), ("answers", answer, len(contexts))):
        ways = {"one at a time": lambda run=run: run(1), "batches": lambda run=run: run(arguments.batch)}
        result[kind] = measure(model, ways, count, arguments.turns)
        for name, way in result[kind].items():
            print(f"{kind:16} {name:14} {way['requests_per_second']:8.2f} per second {way['forwards']:6d} forwards")
    print(json.dumps({**vars(arguments), "torch": torch.__version__, **result}))


if __name__ == "__main__":
    main()
