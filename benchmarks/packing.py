"""What packing saves: a training step on texts of mixed lengths, each in a padded row or side by side in full rows.

    python benchmarks/packing.py [--texts 16] [--block_size 32]

The texts have 64 to 1024 tokens, log-uniform, as chats do; a quarter of each is prompt. Both ways make the same forward
and backward passes over the same texts, in turns within one process of one thread. Times are medians of the processor's
seconds, which depend little on other programs. The losses must be equal. The last line is one JSON object.
"""

import argparse
import json
import math
import platform
import time
from statistics import median

import torch
from torch import Tensor
from transformers import Qwen2Config

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.modeling import make_policy
from relay_hf.trainers.objectives import RECIPES, mean_of_positions
from relay_hf.trainers.rollouts.batches import TextRow
from relay_hf.trainers.rollouts.denoiser import make_denoiser
from relay_hf.trainers.rollouts.packing import Layout
from relay_hf.trainers.rollouts.rollout import Reveal, Rollout
from relay_hf.trainers.rollouts.rows import RolloutRows, all_masked

SHORTEST, LONGEST = 64, 1024
CPU = torch.device("cpu")


def build(arguments: argparse.Namespace) -> tuple[RelayForMaskedDiffusion, RolloutRows, list[int]]:
    """A model, fresh rows, and the lengths of their texts."""
    torch.manual_seed(0)
    backbone = Qwen2Config(
        vocab_size=arguments.vocabulary, hidden_size=arguments.hidden, intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.layers, num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    config = RelayConfig.fast_dllm_v2(
        backbone, mask_token_id=arguments.vocabulary - 1, block_size=arguments.block_size or None
    )
    model = RelayForMaskedDiffusion(config).train()
    exponents = torch.rand(arguments.texts) * math.log(LONGEST / SHORTEST)
    lengths = (SHORTEST * exponents.exp()).long().tolist()
    texts = [TextRow(torch.randint(0, arguments.vocabulary - 1, (n,)), torch.arange(n) >= n // 4) for n in lengths]
    return model, all_masked(config, texts, keeps_state=True, device=CPU), lengths


def step(model: RelayForMaskedDiffusion, rows: RolloutRows, layout: Layout | None, steps: int) -> tuple[float, Tensor]:
    """Seconds of a processor core that one forward and backward pass takes, and its loss."""
    recipe = RECIPES["relay"]
    advances = [Reveal(make_policy("confidence_threshold", 0.85), model.config.block_size)] * steps
    model.zero_grad(set_to_none=True)
    began = time.process_time()
    denoiser = make_denoiser(model, model.config, rows, layout=layout)
    loss = Rollout(denoiser, rows, advances, recipe.carry, mean_of_positions(recipe, lambda count: count)).run_window()
    loss.backward()
    return time.process_time() - began, loss.detach()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--block_size", type=int, default=32, help="0 = whole sequences")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, rows, lengths = build(arguments)
    layout = Layout(rows, LONGEST, model.config.block_size)
    shapes = {"padded": tuple(rows.clean_ids.shape), "packed": tuple(layout.starts.shape)}
    seconds: dict[str, list[float]] = {"padded": [], "packed": []}
    for _ in range(arguments.repeats):
        losses = []
        for name, used in (("padded", None), ("packed", layout)):
            taken, loss = step(model, rows, used, arguments.steps)
            seconds[name].append(taken)
            losses.append(loss)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    ways = {
        name: {
            "rows_and_positions": shapes[name],
            "padding": round(1 - sum(lengths) / math.prod(shapes[name]), 3),
            "tokens_per_second": round(sum(lengths) / median(times)),
        }
        for name, times in seconds.items()
    }
    ratio = median(padded / packed for padded, packed in zip(*seconds.values(), strict=True))
    for name, way in ways.items():
        print(f"{name}: {way}", flush=True)
    print(json.dumps({"tokens": sum(lengths), **ways, "packed_over_padded": round(ratio, 2), **vars(arguments),
                      "torch": torch.__version__, "machine": platform.processor() or platform.machine()}))  # fmt: skip
