"""What decoding costs: `generate` against the reference's loop, against its bare forwards, with and without the relay.

    python benchmarks/decode.py                              # all parts on the small body with Qwen2's vocabulary
    python benchmarks/decode.py --model 135m --parts loop    # the shape of SmolLM2-135M

Parts, each timed in turns within one process, medians reported:

- `loop`: our `generate` against the reference's loop (`reference_loop` in `decode_workload.py`), whose tokens must be
  equal: batch 1, batch 8 of different prompt lengths, batch 8 of one length.
- `overhead`: wall time of `generate` over the sum of the backbone and head forwards that it made, replayed bare.
- `channel`: a denoise forward with the relay state against the same one without, and bytes of state.
- `shortcuts`: the sub-block cache, fused commits and both against exact decoding, and how far their tokens agree.
  Random weights are the worst case for agreement: `divergence.py` asks a trained model.
- `compile`: exact decoding with the backbone compiled against without.
- `ragged`: `generate` for 8 rows of different prompt lengths against 8 of one length, with as many tokens in all and
  one token per step. If lengths are whole blocks apart, both batches take the same steps, so this is the price of
  padding; with any lengths, rows also wait for each other at the ends of blocks, so that steps are more and smaller.
- `batch`: tokens per second as the batch grows.
- `context`: time and peak of the memory that a denoise step allocates, behind 256, 1 024 and 4 096 committed tokens,
  and how much faster that time grows than bare attention over the same keys and values.

Weights are random; `decode_workload.py` says how several tokens per step pass the threshold. The last line is one JSON
object.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from decode_workload import (
    BLOCK,
    Recorder,
    build_model,
    generate,
    make_prompts,
    peak_memory,
    prompt_lengths,
    reference_loop,
)
from torch import Tensor
from torch.nn import functional as F

from relay_hf import RelayCache, RelayForMaskedDiffusion, RelayGenerateOutput

SETTINGS = {"batch 1": (1, False), "batch 8 ragged": (8, True), "batch 8 even": (8, False)}
CONTEXTS = (256, 1024, 4096)
SHORTCUTS = {
    "sub-block cache": {"use_sub_block_cache": True},
    "fused commits": {"fuse_commits": True},
    "both": {"use_sub_block_cache": True, "fuse_commits": True},
}


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def ratios(numerator: Callable[[], float], denominator: Callable[[], float], repeats: int) -> dict[str, float]:
    """Medians of both and of their ratio, measured in turns so that both see the same machine."""
    pairs = [(numerator(), denominator()) for _ in range(repeats)]
    above, below = (median(seconds) for seconds in zip(*pairs, strict=True))
    return {"ratio": median(a / b for a, b in pairs), "numerator_s": above, "denominator_s": below}


def against_loop(model: RelayForMaskedDiffusion, new_tokens: int, repeats: int) -> dict:
    result = {}
    for name, (batch, ragged) in SETTINGS.items():
        prompts = make_prompts(model, batch, ragged)
        output, expected = generate(model, prompts, new_tokens), reference_loop(model, prompts, new_tokens)
        if output.sequences[:, -new_tokens:].tolist() != expected:
            raise RuntimeError(f"{name}: `generate` and the loop differ, so their times cannot be compared.")
        times = ratios(
            lambda prompts=prompts: timed(lambda: reference_loop(model, prompts, new_tokens)),
            lambda prompts=prompts: timed(lambda: generate(model, prompts, new_tokens)),
            repeats,
        )
        steps = output.denoise_forwards.float().mean().item()
        result[name] = {
            "speedup": times["ratio"], "loop_s": times["numerator_s"], "generate_s": times["denominator_s"],
            "denoise_forwards_per_row": steps, "tokens_per_denoise_forward": new_tokens / steps,
        }  # fmt: skip
        print(f"loop, {name}: {json.dumps(result[name])}", flush=True)
    return result


def overhead(model: RelayForMaskedDiffusion, new_tokens: int, repeats: int) -> dict:
    result = {}
    for name, (batch, ragged) in SETTINGS.items():
        prompts = make_prompts(model, batch, ragged)
        recorder = Recorder(model, prompts, new_tokens)
        times = ratios(
            lambda prompts=prompts: timed(lambda: generate(model, prompts, new_tokens)), recorder.replay, repeats
        )
        forwards = sum(call[0] is model.model for call in recorder.calls)
        result[name] = {
            "overhead": times["ratio"], "generate_s": times["numerator_s"], "forwards_s": times["denominator_s"],
            "forwards": forwards,
            "surplus_ms_per_forward": 1e3 * (times["numerator_s"] - times["denominator_s"]) / forwards,
        }  # fmt: skip
        print(f"overhead, {name}: {json.dumps(result[name])}", flush=True)
    return result


def channel(model: RelayForMaskedDiffusion, new_tokens: int, repeats: int) -> dict:
    """Behind a committed prompt, scoring the positions of one sub-block as `generate` does."""
    result: dict = {}
    hidden, vocabulary = model.config.text_config.hidden_size, model.config.text_config.vocab_size
    for batch in (1, 8):
        cache, scored = RelayCache(config=model.config.text_config), torch.zeros(batch, BLOCK, dtype=torch.bool)
        scored[:, :8] = True
        canvas, state = torch.full(scored.shape, model.config.mask_token_id), torch.randn(batch, BLOCK, hidden)

        def denoise(state: Tensor | None, canvas=canvas, cache=cache, scored=scored) -> float:
            with torch.no_grad():
                return timed(
                    lambda: model(canvas, cache=cache.prefix(), relay_state=state, logits_to_keep=scored)
                )  # fmt: skip

        with torch.no_grad():
            model(torch.stack(make_prompts(model, batch, ragged=False))[:, : 2 * BLOCK], cache=cache)
        denoise(None), denoise(state)
        # A forward is short beside a `generate`, so that more of them are needed for a steady median.
        times = ratios(lambda d=denoise, s=state: d(s), lambda d=denoise: d(None), 20 * repeats)
        result[f"batch {batch}"] = {
            "relay_over_none": times["ratio"], "with_ms": 1e3 * times["numerator_s"],
            "without_ms": 1e3 * times["denominator_s"],
        }  # fmt: skip
        print(f"channel, batch {batch}: {json.dumps(result[f'batch {batch}'])}", flush=True)
    result["state_bytes_per_sequence"] = BLOCK * hidden * state.element_size()
    result["logits_bytes_per_sequence"] = BLOCK * vocabulary * state.element_size()
    return result


def shortcuts(model: RelayForMaskedDiffusion, new_tokens: int, repeats: int) -> dict:
    result: dict = {}
    for name, (batch, ragged) in SETTINGS.items():
        prompts = make_prompts(model, batch, ragged)
        exact = generate(model, prompts, new_tokens)
        for label, options in SHORTCUTS.items():
            output = generate(model, prompts, new_tokens, **options)
            agrees = (output.sequences == exact.sequences)[:, -new_tokens:]
            times = ratios(
                lambda prompts=prompts: timed(lambda: generate(model, prompts, new_tokens)),
                lambda prompts=prompts, options=options: timed(lambda: generate(model, prompts, new_tokens, **options)),
                repeats,
            )
            result[f"{label}, {name}"] = {
                "speedup": times["ratio"], "exact_s": times["numerator_s"], "shortcut_s": times["denominator_s"],
                "tokens_agree": agrees.float().mean().item(),
                "tokens_before_first_difference": agrees.long().cumprod(-1).sum(-1).float().mean().item(),
                "denoise_forwards": [forwards(exact, "denoise"), forwards(output, "denoise")],
                "commit_forwards": [forwards(exact, "commit"), forwards(output, "commit")],
            }  # fmt: skip
            print(f"shortcuts, {label}, {name}: {json.dumps(result[f'{label}, {name}'])}", flush=True)
    return result


def forwards(output: RelayGenerateOutput, kind: str) -> float:
    return getattr(output, f"{kind}_forwards").float().mean().item()


def compiled(model: RelayForMaskedDiffusion, new_tokens: int, repeats: int) -> dict:
    """Both kinds of `generate` on one model: `compile` replaces nothing but the backbone's call."""
    prompts = make_prompts(model, 1, ragged=False)
    exact = generate(model, prompts, new_tokens)
    model.model.compile(dynamic=True)
    with_compiler, eagerly = model.model._compiled_call_impl, None

    def run(call: Callable | None) -> float:
        model.model._compiled_call_impl = call
        return timed(lambda: generate(model, prompts, new_tokens))

    first_s = run(with_compiler)
    same = bool((generate(model, prompts, new_tokens).sequences == exact.sequences).all())
    times = ratios(lambda: run(eagerly), lambda: run(with_compiler), repeats)
    run(eagerly)
    result = {
        "speedup": times["ratio"], "eager_s": times["numerator_s"], "compiled_s": times["denominator_s"],
        "first_call_s": first_s, "same_tokens": same,
    }  # fmt: skip
    print(f"compile, batch 1: {json.dumps(result)}", flush=True)
    return result


def ragged(model: RelayForMaskedDiffusion, new_tokens: int, repeats: int) -> dict:
    tokens, result = torch.cat(make_prompts(model, 8, ragged=True)), {}
    even = [66] * 8

    def run(lengths: list[int]) -> float:
        prompts = list(tokens[: sum(lengths)].split(lengths))
        return timed(lambda: generate(model, prompts, new_tokens, unmasking_threshold=1.0))

    run(even)
    for name, lengths in {
        "blocks apart": [34, 98, 66, 66, 34, 98, 34, 98],
        "any": prompt_lengths(8, ragged=True),
    }.items():
        run(lengths)
        times = ratios(lambda lengths=lengths: run(lengths), lambda: run(even), repeats)
        result[name] = {
            "ragged_over_even": times["ratio"], "ragged_s": times["numerator_s"], "even_s": times["denominator_s"],
        }  # fmt: skip
        print(f"ragged, {name}: {json.dumps(result[name])}", flush=True)
    return result


def growth(model: RelayForMaskedDiffusion, new_tokens: int, repeats: int) -> dict:
    batches = {batch: make_prompts(model, batch, ragged=False) for batch in (1, 2, 4, 8)}
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}
    for _ in range(repeats):
        for batch, prompts in batches.items():
            seconds[batch].append(timed(lambda prompts=prompts: generate(model, prompts, new_tokens)))
    speeds = {batch: batch * new_tokens / median(values) for batch, values in seconds.items()}
    print("batch, tokens per second:", json.dumps(speeds), flush=True)
    return {"tokens_per_second": speeds, "batch_8_over_1": speeds[8] / speeds[1]}


def context(model: RelayForMaskedDiffusion, new_tokens: int, repeats: int) -> dict:
    """A denoise step of one block behind committed tokens, and bare attention over the same keys and values."""
    config, block = model.config.text_config, torch.full((1, BLOCK), model.config.mask_token_id)
    nothing, width = block.new_empty(0), config.hidden_size // config.num_attention_heads
    caches, shapes, memory = {}, {}, {}
    for length in CONTEXTS:
        caches[length] = cache = RelayCache(config=config)
        cache.reserve(length + BLOCK)
        with torch.no_grad():
            model(torch.randint(0, config.vocab_size - 1, (1, length)), cache=cache, logits_to_keep=nothing)
        keys = torch.randn(1, config.num_key_value_heads, length + BLOCK, width)
        shapes[length] = (torch.randn(1, config.num_attention_heads, BLOCK, width), keys, torch.randn_like(keys))

    @torch.no_grad()
    def step(length: int) -> None:
        model(block, cache=caches[length].prefix(), logits_to_keep=nothing)

    @torch.no_grad()
    def attention(length: int) -> None:
        for _ in range(config.num_hidden_layers):
            F.scaled_dot_product_attention(*shapes[length], enable_gqa=True)

    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(20 * repeats + 2):
        for length in CONTEXTS:
            for name, run in (("step", step), ("attention", attention)):
                took = timed(lambda run=run, length=length: run(length))
                if turn >= 2:  # warm by then
                    seconds.setdefault((name, length), []).append(took)
    for length in CONTEXTS:
        memory[length] = peak_memory(lambda length=length: step(length)) / 2**20
    times = {name: {n: 1e3 * median(seconds[name, n]) for n in CONTEXTS} for name in ("step", "attention")}
    shortest, longest = CONTEXTS[0], CONTEXTS[-1]
    # In pairs of one turn, so that both see the same machine.
    growth = [
        [b - a for a, b in zip(seconds[name, shortest], seconds[name, longest], strict=True)]
        for name in ("step", "attention")
    ]
    result = {
        "step_ms": times["step"], "attention_ms": times["attention"],
        "growth_over_attention": median(growth[0]) / median(growth[1]), "step_peak_mib": memory,
    }  # fmt: skip
    print(f"context: {json.dumps(result)}", flush=True)
    return result


PARTS = {
    "loop": against_loop,
    "overhead": overhead,
    "channel": channel,
    "shortcuts": shortcuts,
    "compile": compiled,
    "ragged": ragged,
    "batch": growth,
    "context": context,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", choices=["small", "135m"], default="small")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--sharpness", type=float, help="scale of the logits, by default that of the model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = build_model(arguments.model, arguments.sharpness)
    generate(model, make_prompts(model, 1, ragged=False), BLOCK)  # warm
    results = {part: PARTS[part](model, arguments.new_tokens, arguments.repeats) for part in arguments.parts}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    environment = {"machine": platform.machine(), "torch": torch.__version__, "commit": commit}
    print(json.dumps({**results, **vars(arguments), **environment}))
