"""What each channel costs, against none: a denoise step behind a committed prompt, as `generate` runs it.

    python benchmarks/channels.py [--vocabulary 151936] [--batch 1]

One body and one head; the channels take turns within one process, medians reported. A step reads the carried state,
runs the block, chooses the best tokens of one sub-block and makes the next state. The last line is one JSON object.
"""

import argparse
import json
import platform
import time
from statistics import median

import torch
from transformers import Qwen2Config

from relay_hf import RelayCache, RelayConfig, RelayForMaskedDiffusion
from relay_hf.modeling.channel_relay import CHANNELS
from relay_hf.modeling.prefix_relay import denoise

BLOCK, SUB_BLOCK = 32, 8


class Bench:
    """A model with one of the channels, ready for a step."""

    def __init__(self, channel: str, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        backbone = Qwen2Config(
            vocab_size=arguments.vocabulary, hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
        )  # fmt: skip
        config = RelayConfig.fast_dllm_v2(backbone, mask_token_id=arguments.vocabulary - 1, relay_channel=channel)
        self.model = RelayForMaskedDiffusion(config).eval()
        self.cache = RelayCache(config=backbone)
        self.block = torch.full((arguments.batch, BLOCK), config.mask_token_id)
        candidates = torch.zeros_like(self.block, dtype=torch.bool)
        candidates[:, :SUB_BLOCK] = True
        self.candidates = candidates.nonzero().unbind(-1)
        self.seconds: list[float] = []
        with torch.no_grad():
            prompt = torch.randint(0, config.mask_token_id, (arguments.batch, arguments.prefix))
            self.model(prompt, cache=self.cache)
            self.state = self.step(None)

    @torch.no_grad()
    def step(self, state: torch.Tensor | None) -> torch.Tensor | None:
        output = denoise(self.model, self.block, self.cache.prefix(), state, self.candidates)
        self.model.best_tokens(output.head_inputs)
        return output.relay_state

    def time(self) -> None:
        began = time.perf_counter()
        self.step(self.state)
        self.seconds.append(time.perf_counter() - began)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prefix", type=int, default=128, help="committed positions")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    benches = {channel: Bench(channel, arguments) for channel in CHANNELS}
    for _ in range(arguments.repeats):
        for bench in benches.values():
            bench.time()
    result = {}
    for channel, bench in benches.items():
        against = [own / none for own, none in zip(bench.seconds, benches["none"].seconds, strict=True)]
        result[channel] = {
            "milliseconds": 1e3 * median(bench.seconds),
            "against_none": median(against),
            "state_bytes_per_sequence": 0
            if bench.state is None
            else bench.state[0].numel() * bench.state.element_size(),
            "extra_parameters": sum(parameter.numel() for parameter in bench.model.relay.parameters()),
        }
        print(f"{channel}: {json.dumps(result[channel])}", flush=True)
    logits = 4 * BLOCK * arguments.vocabulary
    print(json.dumps({**result, "bytes_of_the_block's_logits": logits, **vars(arguments), "torch": torch.__version__,
                      "machine": platform.machine()}))  # fmt: skip
