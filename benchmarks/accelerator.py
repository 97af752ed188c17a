"""Ten minutes of a GPU: what decoding and training cost there, and what would make them faster. Random weights.

    python benchmarks/accelerator.py > numbers.jsonl         # the shape of Fast-dLLM v2 1.5B; 80 GB of memory
    python benchmarks/accelerator.py --parts b d             # of the parts a to g
    python -m tests.device.fakegpu && python benchmarks/accelerator.py --device fakegpu --tiny    # on the test device

Every part prints one line of JSON as it ends: what it measured, within its own limit of seconds, and what went wrong.
Times are medians of ten after three that warm up, in milliseconds, with the device idle before and after.

a  where the host waits: one `generate`, two training steps
b  a denoise forward, 1 and 32 rows: time, launches, how long the device is busy; compiled; in a graph
c  attention alone: kernels, masks, grouped heads, lengths
d  `generate`: one row, even and ragged rows; static steps beside dynamic ones
e  the head: the best token of 8 to 1024 positions, and how often bf16 ties the two best
f  a training step of 2 x 2048 tokens, K = 2: attention, checkpointing, blocks in work; time, memory, launches
g  whether tokens, losses and gradients equal the CPU's, and a ragged batch its rows alone
"""

import argparse
import contextlib
import copy
import itertools
import json
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
from accelerator_workload import BLOCK, Bench, Clock, DenoiseForward, make_trainer
from datasets import disable_progress_bars
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

import relay_hf
from relay_hf.testing import tiny_model

# What a part reports: a name and a number, or a sentence. What it has reported before its limit stays.
Findings = Iterator[tuple[str, Any]]


def attempt(run: Callable[..., Any], *arguments: Any) -> Any:
    """What a program returns, or a sentence that says what it raised: a device may lack what it is asked for."""
    try:
        return run(*arguments)
    except TimeoutError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {str(error).split(chr(10))[0][:200]}"


def implementations(model: Any) -> list[str]:
    """Attention implementations to compare, that of the model first."""
    names = [model.model.config._attn_implementation, "relay_blocks", "sdpa", "flex_attention"]
    return [name for name in dict.fromkeys(names) if name in AttentionInterface()]


# -- a: waits ---------------------------------------------------------------------------------------------------------


def waits(bench: Bench) -> Findings:
    """The lines at which the host waits for the device."""
    model = bench.model(torch.bfloat16).eval()
    yield "generate", bench.waits(partial(bench.generate, model, [bench.prompt] * 2))
    trainer = make_trainer(bench, bench.model(torch.float32), 2, blocks=bench.length // BLOCK)
    yield "two training steps", bench.waits(trainer.train)


# -- b: a denoise forward ---------------------------------------------------------------------------------------------


def forwards(bench: Bench) -> Findings:
    """A denoise forward and the choice of its tokens."""
    model = bench.model(torch.bfloat16).eval()
    yield "weight_bytes", sum(weight.numel() * weight.element_size() for weight in model.parameters())
    for rows in (1, bench.many):
        forward = DenoiseForward(bench, model, rows)
        yield f"{rows}: eager_ms", bench.milliseconds(forward)
        yield f"{rows}: kernels", bench.launches(forward)
        yield f"{rows}: graph_ms", attempt(bench.replayed, forward)
    if not bench.tiny:
        model.model.compile(dynamic=True)
        for rows in (1, bench.many):
            yield f"{rows}: compiled_ms", attempt(bench.milliseconds, DenoiseForward(bench, model, rows))


# -- c: attention -----------------------------------------------------------------------------------------------------


def attention(bench: Bench) -> Findings:
    """Kernels and masks of the shapes that decoding and training ask for."""
    seen = bench.prompt + BLOCK
    shapes = {
        "denoise, 1": (1, BLOCK, seen),
        f"denoise, {bench.many}": (bench.many, BLOCK, seen),
        "clean pass": (2, bench.length, bench.length),
        "clean pass, one more": (2, bench.length + 1, bench.length + 1),
    }
    for name, shape in shapes.items():
        calls = attention_calls(bench, *shape)
        for call, run in calls.items():
            yield f"{name}: {call}", attempt(bench.milliseconds, run)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            for call in ("grouped", "grouped, row mask", "repeated, mask"):
                yield f"{name}: {call}, {backend.name}", attempt(with_kernel, bench, backend, calls[call])


def attention_calls(bench: Bench, rows: int, queries: int, keys: int) -> dict[str, Callable[[], Any]]:
    """Ways to compute the same attention; masks hide the first quarter of the keys."""
    text = bench.text_config()
    heads, groups, width = (
        text.num_attention_heads,
        text.num_key_value_heads,
        text.hidden_size // text.num_attention_heads,
    )
    new = partial(torch.randn, device=bench.device, dtype=torch.bfloat16)
    query, key, value = new(rows, heads, queries, width), new(rows, groups, keys, width), new(rows, groups, keys, width)
    row_mask = (torch.arange(keys, device=bench.device) >= keys // 4).expand(rows, 1, 1, keys)
    mask = row_mask.expand(-1, -1, queries, -1).contiguous()
    repeated = [each.repeat_interleave(heads // groups, 1) for each in (key, value)]
    packed = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
    starts = [torch.arange(rows + 1, device=bench.device, dtype=torch.int32) * n for n in (queries, keys)]
    grouped = partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=True)

    def repeating() -> Tensor:
        return F.scaled_dot_product_attention(
            query, *(each.repeat_interleave(heads // groups, 1) for each in (key, value)), attn_mask=mask
        )

    return {
        "grouped": grouped,
        "grouped, mask": partial(grouped, attn_mask=mask),
        "grouped, row mask": partial(grouped, attn_mask=row_mask),
        "repeated, mask": partial(F.scaled_dot_product_attention, query, *repeated, attn_mask=mask),
        "repeating, mask": repeating,
        "variable length": partial(varlen_attn, *packed, *starts, queries, keys, enable_gqa=True),
    }


def with_kernel(bench: Bench, backend: SDPBackend, run: Callable[[], Any]) -> float:
    if bench.device.type != "cuda":
        raise NotImplementedError(f"{bench.device.type} has no choice of kernels")
    with sdpa_kernel(backend):
        return bench.milliseconds(run)


# -- d: generate ------------------------------------------------------------------------------------------------------


def decoding(bench: Bench) -> Findings:
    """Dynamic and static steps, and the attention implementations."""
    model = bench.model(torch.bfloat16).eval()
    static = {"cache_implementation": "static"}
    runs = [(name, kind) for name, kind in itertools.product(implementations(model), ({}, static))]
    for implementation, options in runs:
        if implementation == "flex_attention" and (options or bench.tiny):  # it would be compiled
            continue
        attempt(model.set_attn_implementation, implementation)
        for batch, lengths in bench.batches().items():
            name = f"{implementation}, {'static' if options else 'dynamic'}, {batch}"
            yield name, attempt(one_decoding, bench, model, lengths, options)


def one_decoding(bench: Bench, model: Any, lengths: list[int], options: dict[str, Any]) -> dict[str, Any]:
    run = partial(bench.generate, model, lengths, **options)
    output = run()  # compiles what is compiled
    taken = 1000 * median(bench.seconds(run) for _ in range(bench.repeats // 4 + 1))
    sums = output.sequences[:, -bench.new_tokens :].sum(-1)
    return {
        "ms": round(taken, 2),
        "ms_per_denoise_forward": round(taken / int(output.denoise_forwards.max()), 3),
        "sums_of_tokens": sums[:2].tolist(),  # equal texts have equal ones
    }


# -- e: the head ------------------------------------------------------------------------------------------------------


def head(bench: Bench) -> Findings:
    """The best token of each position: ours, from fp32 products of bf16 inputs, and compiled."""
    model = bench.model(torch.bfloat16).eval()
    weight = model.lm_head.weight.detach()

    def product(hidden: Tensor) -> Tensor:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    def best(hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = product(hidden)
        value, token = logits.max(-1)
        return (value - logits.logsumexp(-1)).exp(), token

    programs = {"best_tokens": model.best_tokens, "fp32 product": product}
    if not bench.tiny:
        programs["compiled"] = torch.compile(best, dynamic=True)
    for positions in (8, 256, 1024):
        hidden = torch.randn(positions, weight.shape[1], device=bench.device, dtype=torch.bfloat16)
        for name, program in programs.items():
            yield f"{positions}: {name}_ms", attempt(bench.milliseconds, torch.no_grad()(partial(program, hidden)))
        two = (hidden @ weight.T).topk(2).values
        yield f"{positions}: share of ties in bf16", round(float((two[:, 0] == two[:, 1]).float().mean()), 4)


# -- f: training ------------------------------------------------------------------------------------------------------


def training(bench: Bench) -> Findings:
    """An optimizer step of the relay objective, in bf16 autocast over fp32 weights."""
    model = bench.model(torch.float32)
    every = bench.length // BLOCK
    torch._dynamo.config.recompile_limit = 16
    for implementation in implementations(model):
        if implementation == "flex_attention" and bench.tiny:
            continue
        attempt(model.set_attn_implementation, implementation)
        for blocks, checkpointing in ((every, False), (every, True), (every // 2, False), (4, False)):
            name = f"{implementation}, {blocks} blocks{', checkpointing' if checkpointing else ''}"
            yield name, attempt(one_training, bench, model, blocks, checkpointing)


def one_training(bench: Bench, model: Any, blocks: int, checkpointing: bool) -> dict[str, Any]:
    model.gradient_checkpointing_disable()  # an earlier trainer's
    make = partial(make_trainer, bench, model, blocks=blocks, checkpointing=checkpointing)
    trainer, clock = make(steps=2 if bench.tiny else 6), Clock(bench)
    trainer.add_callback(clock)
    peak = bench.peak_bytes(trainer.train)
    return {
        "ms": round(1000 * median(clock.times[-4:]), 2),
        "peak_bytes": peak,
        **bench.launches(make(steps=1).train),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


# -- g: equal to the CPU ----------------------------------------------------------------------------------------------

PROMPTS = torch.randint(1, 60, (3, 21), generator=torch.Generator().manual_seed(0))
# The first row is shorter than a block of eight.
VISIBLE = torch.tensor([[0] * 18 + [1] * 3, [0] * 5 + [1] * 16, [1] * 21])
OPTIONS = {"max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0, "unmasking_threshold": 0.3}


def equality(bench: Bench) -> Findings:
    """A tiny model in fp32 on the CPU and on the device; in bf16, a batch and its rows alone."""
    torch.set_float32_matmul_precision("highest")
    model = tiny_model(open_channel=True, block_size=8)
    (text, loss, slope), (other_text, other_loss, other_slope) = (
        text_and_gradient(copy.deepcopy(model).to(device), device) for device in ("cpu", bench.device)
    )
    yield "tokens equal", torch.equal(text, other_text)
    yield "losses", [loss, other_loss]
    yield "largest difference of gradients", float((slope - other_slope).abs().max())
    half, ids, visible = copy.deepcopy(model).to(bench.device, torch.bfloat16), *to(bench.device, PROMPTS, VISIBLE)
    batch = half.generate(ids, attention_mask=visible, **OPTIONS)[:, -30:]
    alone = [half.generate(ids[row : row + 1, VISIBLE[row] > 0], **OPTIONS)[0, -30:] for row in range(len(ids))]
    yield "share of tokens equal to those of a row alone, bf16", float((batch == torch.stack(alone)).float().mean())


def text_and_gradient(model: Any, device: Any) -> tuple[Tensor, float, Tensor]:
    """Tokens of a ragged batch, a loss of two steps, and all gradients in a row, on the CPU."""
    ids, visible = to(device, PROMPTS, VISIBLE)
    text = model.generate(ids, attention_mask=visible, **OPTIONS).cpu()
    masked = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) % 3 == 0, model.config.mask_token_id)
    state = model(masked, attention_mask=visible).relay_state
    labels = ids.masked_fill(visible == 0, -100)
    loss = model(masked, attention_mask=visible, relay_state=state, labels=labels).loss
    loss.backward()
    slopes = [weight.grad.flatten().cpu() for weight in model.parameters() if weight.grad is not None]
    return text, loss.item(), torch.cat(slopes)


def to(device: Any, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]


# -- all parts --------------------------------------------------------------------------------------------------------

# Name -> what it measures, and its limit in seconds on a GPU.
PARTS: dict[str, tuple[Callable[[Bench], Findings], int]] = {
    "a": (waits, 60), "b": (forwards, 110), "c": (attention, 60), "d": (decoding, 150), "e": (head, 40),
    "f": (training, 150), "g": (equality, 30),
}  # fmt: skip


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises a TimeoutError when the time is over."""

    def stop(*arguments: Any) -> None:
        raise TimeoutError(f"stopped after {seconds} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def run_part(name: str, bench: Bench) -> dict[str, Any]:
    """What a part has found, and what ended it early."""
    measure, limit = PARTS[name]
    found: dict[str, Any] = {}
    result = {"part": name, "what": measure.__name__, "found": found}
    began = time.perf_counter()
    try:
        with limited(limit):
            for key, value in measure(bench):
                found[key] = value
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"[:500]
    if bench.device.type != "cpu":
        torch.get_device_module(bench.device).empty_cache()
    return {**result, "seconds": round(time.perf_counter() - began, 1)}


def environment(bench: Bench) -> dict[str, Any]:
    is_cuda = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else bench.device.type,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if is_cuda else None,
        "torch": torch.__version__, "transformers": transformers.__version__, "relay_hf": relay_hf.__version__,
        "tiny": bench.tiny,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU, and nothing compiled")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    warnings.simplefilter("ignore")
    bench = Bench(arguments.device, arguments.tiny)
    print(json.dumps(environment(bench)), flush=True)
    for part in arguments.parts:
        print(json.dumps(run_part(part, bench)), flush=True)


if __name__ == "__main__":
    main()
