"""vLLM with a relay model: does it write what `generate` writes, how fast, and where does the time of a step go?

    python benchmarks/vllm_gpu.py                           # on a GPU: the shape of Fast-dLLM v2 1.5B, random weights
    python benchmarks/vllm_gpu.py --model PATH_OR_REPO      # a checkpoint of yours
    python benchmarks/vllm_gpu.py --shape small --cpu       # fp32, vLLM's own kernels in Triton's interpreter

In an environment that has vLLM and relay_hf. Each part prints one line of JSON as it ends:

tokens       requests of which vLLM and `generate` write the same text, one of them drawn; in fp32 and in --dtype
throughput   tokens per second for 1, 4, 16, .. requests at once: vLLM, and `generate` over the same prompts as a batch
steps        steps per second for as many requests; the share of a step in the backbone, the head, in ours, in the rest

Numbers are medians of --repeats runs behind one that warms up, with the range. "Ours" is the preparation of a step, its
attention's metadata and the sampler; the rest is vLLM's scheduler and runner. With --cpu the rest is mostly Triton's
interpreter, which a GPU does not have. On a GPU, `steps` waits for the device around each part, so that its steps are
slower than those of `throughput`.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHAPES: dict[str, dict[str, Any]] = {
    "1.5b": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 4096},
    "small": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024},
    "tiny": {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512},
}  # fmt: skip
PARTS = ("tokens", "throughput", "steps")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; by default random weights of --shape")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16, 64], help="how many at once")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument(
        "--per_step", type=int, default=2, help="positions that a step reveals, for a like number of steps"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default=None, help="of throughput and steps: bfloat16, on a CPU float32")
    parser.add_argument("--memory_gb", type=float, default=None, help="for keys and values; by default vLLM decides")
    parser.add_argument("--cpu", action="store_true", help="with the shim of tests/vllm")
    return parser.parse_args()


def prepare(arguments: argparse.Namespace) -> None:
    """What has to be so before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, so that `steps` can look inside
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    arguments.dtype = arguments.dtype or ("float32" if arguments.cpu else "bfloat16")
    if arguments.cpu:
        sys.path.insert(0, str(ROOT))
        import tests.vllm.shim  # noqa: F401


def make_model(shape: str, folder: str) -> str:
    """Saves random weights with an open channel; returns the folder."""
    import torch
    from transformers import Qwen2Config

    from relay_hf import RelayConfig, RelayForMaskedDiffusion

    torch.manual_seed(0)
    fields = SHAPES[shape]
    text = Qwen2Config(**fields, initializer_range=0.05, tie_word_embeddings=True)
    config = RelayConfig.fast_dllm_v2(text, mask_token_id=fields["vocab_size"] - 1)
    model = RelayForMaskedDiffusion(config)
    for parameter in model.relay.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.to(torch.float32 if shape != "1.5b" else torch.bfloat16).save_pretrained(folder)
    return folder


class Sides:
    """vLLM and `generate` on one checkpoint.

    Args:
        arguments: of the command line.
        source: the checkpoint.
        dtype: of both.
    """

    def __init__(self, arguments: argparse.Namespace, source: str, dtype: str) -> None:
        import torch
        from vllm import LLM

        from relay_hf import RelayForMaskedDiffusion

        self.device = "cpu" if arguments.cpu else "cuda"
        self.model = RelayForMaskedDiffusion.from_pretrained(source, dtype=dtype).to(self.device).eval()
        memory = arguments.memory_gb or (0.25 if arguments.cpu else None)
        room = {"gpu_memory_utilization": 0.6} if memory is None else {"kv_cache_memory_bytes": int(memory * 2**30)}
        self.llm = LLM(
            source,
            dtype=dtype,
            skip_tokenizer_init=True,
            enforce_eager=arguments.cpu,
            max_num_seqs=max(arguments.requests),
            max_model_len=arguments.prompt_tokens + arguments.new_tokens + 64,
            enable_prefix_caching=False,
            disable_log_stats=False,
            **room,
        )
        self.new, self.torch = arguments.new_tokens, torch

    def prompts(self, count: int, length: int) -> list[list[int]]:
        generator = self.torch.Generator().manual_seed(count)
        most = self.model.config.text_config.vocab_size - 1
        lengths = [max(length - 3 * (i % 5), 1) for i in range(count)]
        return [self.torch.randint(3, most, (n,), generator=generator).tolist() for n in lengths]

    def serve(self, prompts: list[list[int]], options: list[dict[str, Any]]) -> list[Any]:
        """The outputs of vLLM, all requests at once; nothing stops before its last token."""
        from vllm import SamplingParams

        params = [SamplingParams(max_tokens=self.new, detokenize=False, ignore_eos=True, extra_args=o) for o in options]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    def generate(self, prompts: list[list[int]], options: dict[str, Any]) -> list[list[int]]:
        """The new tokens that `generate` writes to the prompts as one batch."""
        torch, longest = self.torch, max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        known = {"max_new_tokens": self.new, "eos_token_id": None, "pad_token_id": 0}
        return self.model.generate(ids, attention_mask=mask, **known, **options)[:, longest:].tolist()

    def wait(self) -> None:
        if self.device != "cpu":
            self.torch.cuda.synchronize()


def policy(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"unmasking_policy": "fixed_count", "unmasking_threshold": arguments.per_step}


def speeds(run: Callable[[], Any], repeats: int, amount: int) -> dict[str, float]:
    """Median and range of an amount per second of a run, behind one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    found = sorted(amount / each for each in seconds[1:])
    return {"median": round(statistics.median(found), 1), "least": round(found[0], 1), "most": round(found[-1], 1)}


def tokens(sides: Sides, arguments: argparse.Namespace) -> dict[str, Any]:
    """How many requests have the same text on both sides, and how many if nothing is carried."""
    prompts = sides.prompts(16, arguments.prompt_tokens)
    options = [{**policy(arguments), "unmasking_threshold": 1 + i % 4} for i in range(16)]
    options[0] = {"unmasking_threshold": 0.5, "do_sample": True, "sampling_seeds": [11]}
    served = [list(output.token_ids) for output in sides.serve(prompts, options)]
    expected = [sides.generate([p], o)[0] for p, o in zip(prompts, options, strict=True)]
    off = [sides.generate([p], {**o, "use_relay": False})[0] for p, o in zip(prompts, options, strict=True)]
    same = [mine == theirs for mine, theirs in zip(served, expected, strict=True)]
    return {
        "requests": len(prompts),
        "same": sum(same),
        "drawn one is the same": same[0],
        "same if nothing is carried": sum(mine == theirs for mine, theirs in zip(served, off, strict=True)),
    }


def throughput(sides: Sides, arguments: argparse.Namespace) -> dict[str, Any]:
    """New tokens per second on both sides."""
    found = {}
    for count in arguments.requests:
        prompts = sides.prompts(count, arguments.prompt_tokens)

        def serve(prompts: list[list[int]] = prompts) -> None:
            sides.serve(prompts, [policy(arguments)] * len(prompts))
            sides.wait()

        def generate(prompts: list[list[int]] = prompts) -> None:
            sides.generate(prompts, policy(arguments))
            sides.wait()

        total = count * sides.new
        found[count] = {
            "vllm": speeds(serve, arguments.repeats, total),
            "generate": speeds(generate, arguments.repeats, total),
        }
    return found


class Stopwatch:
    """Adds up the seconds in methods of objects.

    Args:
        wait: waits for the device.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def watch(self, owner: Any, method: str, name: str) -> None:
        plain = getattr(owner, method)

        def run(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            begin = time.perf_counter()
            result = plain(*args, **kwargs)
            self.wait()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
            self.calls[name] = self.calls.get(name, 0) + 1
            return result

        setattr(owner, method, run)


def steps(sides: Sides, arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps per second, and the shares of a step."""
    runner = sides.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    watch, sampler = Stopwatch(sides.wait), runner.sampler
    watch.watch(runner.model, "forward", "backbone")
    watch.watch(runner.model, "logits_of", "head")
    watch.watch(runner.model_state, "prepare_inputs", "ours")
    watch.watch(runner.model_state, "prepare_attn", "ours: attention")
    runner.sampler = lambda *args, **kwargs: sample(*args, **kwargs)
    for name in ("add_request", "apply_staged_writes", "penalties_state", "req_states"):
        setattr(runner.sampler, name, getattr(sampler, name))
    holder = argparse.Namespace(call=sampler.__call__)
    watch.watch(holder, "call", "ours: sampler")
    sample = holder.call
    found = {}
    for count in arguments.requests:
        prompts, options = sides.prompts(count, arguments.prompt_tokens), [policy(arguments)] * count
        sides.serve(prompts, options)
        watch.seconds.clear()
        watch.calls.clear()
        begin = time.perf_counter()
        for _ in range(arguments.repeats):
            sides.serve(prompts, options)
        sides.wait()
        total, done = time.perf_counter() - begin, watch.calls["backbone"]
        # The sampler calls the head.
        ours = (
            sum(seconds for name, seconds in watch.seconds.items() if name.startswith("ours")) - watch.seconds["head"]
        )
        found[count] = {
            "steps per second": round(done / total, 2),
            "ms per step": round(1e3 * total / done, 2),
            "ms of backbone": round(1e3 * watch.seconds["backbone"] / done, 2),
            "ms of head": round(1e3 * watch.seconds["head"] / done, 2),
            "ms of ours": round(1e3 * ours / done, 2),
            "share outside backbone and head": round(
                1 - (watch.seconds["backbone"] + watch.seconds["head"]) / total, 3
            ),
            "share of ours": round(ours / total, 3),
        }
    return found


def main() -> None:
    arguments = parse()
    prepare(arguments)
    import torch
    import vllm

    torch.set_num_threads(1 if arguments.cpu else torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.model or make_model(arguments.shape, folder)
        machine = "cpu, one thread" if arguments.cpu else torch.cuda.get_device_name()
        known = {
            "machine": machine,
            "torch": torch.__version__,
            "vllm": vllm.__version__,
            "model": arguments.model or arguments.shape,
        }
        parts = {"tokens": tokens, "throughput": throughput, "steps": steps}
        for dtype in dict.fromkeys((*(["float32"] if "tokens" in arguments.parts else []), arguments.dtype)):
            sides = Sides(arguments, source, dtype)
            for part in arguments.parts:
                if part == "tokens" or dtype == arguments.dtype:
                    print(
                        json.dumps({"part": part, "dtype": dtype, **known, "found": parts[part](sides, arguments)}),
                        flush=True,
                    )
            del sides


if __name__ == "__main__":
    main()
