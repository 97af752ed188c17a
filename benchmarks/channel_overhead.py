"""What the channel costs: a denoise forward with the relay state against the same forward without, in one run.

python benchmarks/channel_overhead.py [--vocab 151936] [--batch 1]

Alternates the two, prints medians, and ends with one JSON line whose `ratio` is with / without. Also says how many
bytes of state a sequence carries, beside those that carrying its logits would need.
"""

import argparse
import json
import platform
import time
from statistics import median

import torch
from transformers import Qwen2Config

from relay_hf import RelayCache, RelayConfig, RelayForMaskedDiffusion

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--vocab", type=int, default=32_000)
parser.add_argument("--hidden", type=int, default=256)
parser.add_argument("--layers", type=int, default=6)
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--prefix", type=int, default=128, help="committed positions")
parser.add_argument("--repeats", type=int, default=50)
arguments = parser.parse_args()

torch.manual_seed(0)
backbone = Qwen2Config(
    vocab_size=arguments.vocab, hidden_size=arguments.hidden, intermediate_size=4 * arguments.hidden,
    num_hidden_layers=arguments.layers, num_attention_heads=arguments.hidden // 64,
    num_key_value_heads=arguments.hidden // 64,
)  # fmt: skip
model = RelayForMaskedDiffusion(RelayConfig.fast_dllm_v2(backbone, mask_token_id=arguments.vocab - 1)).eval()
block_size = model.config.block_size
cache = RelayCache(config=backbone)
canvas = torch.full((arguments.batch, block_size), model.config.mask_token_id)
state = torch.randn(arguments.batch, block_size, arguments.hidden)


def denoise(relay_state: torch.Tensor | None) -> float:
    began = time.perf_counter()
    with cache.drafting():
        model(canvas, past_key_values=cache, relay_state=relay_state)
    return time.perf_counter() - began


with torch.inference_mode():
    model(torch.randint(0, arguments.vocab - 1, (arguments.batch, arguments.prefix)), past_key_values=cache)
    for _ in range(5):
        denoise(None), denoise(state)
    pairs = [(denoise(None), denoise(state)) for _ in range(arguments.repeats)]
without, carried = (median(times) for times in zip(*pairs, strict=True))
print(f"without {1e3 * without:.2f} ms, with {1e3 * carried:.2f} ms per denoise forward, medians of {len(pairs)}")
result = {
    "ratio": median(b / a for a, b in pairs),
    "milliseconds_without": 1e3 * without,
    "milliseconds_with": 1e3 * carried,
    "state_bytes_per_sequence": block_size * arguments.hidden * 4,
    "logits_bytes_per_sequence": block_size * arguments.vocab * 4,
    "repeats": len(pairs),
    "threads": torch.get_num_threads(),
    "machine": platform.machine(),
    "torch": torch.__version__,
    **{name: getattr(arguments, name) for name in ("vocab", "hidden", "layers", "batch", "prefix")},
}
print(json.dumps(result))
