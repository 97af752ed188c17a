"""A training step to be timed and weighed, shared by the benchmarks of the rollout engine."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from transformers import Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the published scheme, an oracle of the tests
from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.modeling import make_policy
from relay_hf.trainers.model_preparation import keep_caches_under_checkpointing
from relay_hf.trainers.objectives import RECIPES, mean_of_positions
from relay_hf.trainers.rollouts.denoiser import BlockDenoiser
from relay_hf.trainers.rollouts.noise import mask_uniformly
from relay_hf.trainers.rollouts.rollout import Reveal, Rollout
from relay_hf.trainers.rollouts.rows import RolloutRows, fresh_rows
from tests.trainers.rollouts.doubled import DoubledDenoiser, PublishedDenoiser

DENOISERS = {
    "published": PublishedDenoiser,
    "plain": DoubledDenoiser,
    "engine": BlockDenoiser,
}
# Freed tensors go back to the system at once, so that resident memory is live memory.
LIVE_MEMORY = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Workload:
    """One forward and backward pass of training on random text.

    Args:
        denoiser: `"engine"` is ours. The doubled sequence `"published"`; `"plain"`, without a loss that the published
            code computes and drops.
        objective, steps: what is learned, in K steps.
        active_blocks: blocks at the end of each row that still hold masks; None = all behind the prompt.
        checkpointing: recompute activations in the backward pass.
    """

    denoiser: str = "engine"
    objective: str = "relay"
    steps: int = 2
    window: int | None = None
    active_blocks: int | None = None
    checkpointing: bool = False
    vocab: int = 151_936
    hidden: int = 256
    layers: int = 6
    length: int = 512
    prompt: int = 128
    batch: int = 2
    threads: int = 2

    def build(self) -> tuple[RelayForMaskedDiffusion, RolloutRows]:
        """A model and fresh rows."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        backbone = Qwen2Config(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=4, num_key_value_heads=4,
        )  # fmt: skip
        model = RelayForMaskedDiffusion(RelayConfig.fast_dllm_v2(backbone, mask_token_id=self.vocab - 1)).train()
        if self.checkpointing:
            model.gradient_checkpointing_enable()
            keep_caches_under_checkpointing(model)
        input_ids = torch.randint(0, self.vocab - 1, (self.batch, self.length))
        labels = input_ids.clone()
        labels[:, : self.prompt] = -100
        return model, fresh_rows(model.config, {"input_ids": input_ids, "labels": labels}, keeps_state=True)

    @property
    def blocks(self) -> int:
        """Blocks behind the prompt."""
        return (self.length - self.prompt) // RelayConfig.fast_dllm_v2().block_size

    def step(self, model: RelayForMaskedDiffusion, rows: RolloutRows) -> float:
        """Seconds of one forward and backward pass; leaves the gradients."""
        recipe = RECIPES[self.objective]
        if recipe.uses_buffer:
            policy = make_policy("confidence_threshold", 0.85)
            advances = [Reveal(policy, model.config.block_size)] * self.steps
        else:
            rows = mask_uniformly(rows, model.config, [torch.Generator().manual_seed(row) for row in range(len(rows))])
            advances = recipe.advances(None, model.config, False)
        if self.active_blocks is not None:
            first = self.length - self.active_blocks * model.config.block_size
            rows = replace(rows, masked=rows.masked & (torch.arange(self.length) >= first))
        model.zero_grad(set_to_none=True)
        reduce_loss = mean_of_positions(recipe, share=lambda count: count)
        began = time.perf_counter()
        denoiser = DENOISERS[self.denoiser](model, model.config, rows)
        run = Rollout(denoiser, rows, advances, recipe.carry, reduce_loss, self.window)
        while run.windows_left > 1:
            run.run_window().backward()
        loss = run.run_window()
        del run, denoiser  # as in the trainer, which keeps no more than the loss and the rows
        loss.backward()
        return time.perf_counter() - began

    def peak_mebibytes(self) -> float:
        """Peak memory of a process that makes one step, beyond that of one which only imports the same."""
        return _peak(asdict(self)) - _peak(None)


def median_seconds(workloads: dict[str, Workload], repeats: int) -> dict[str, float]:
    """Median step time of each, one after the other in every round; all share the model of the first."""
    model, rows = next(iter(workloads.values())).build()
    times: dict[str, list[float]] = {name: [] for name in workloads}
    for _ in range(repeats):
        for name, workload in workloads.items():
            times[name].append(workload.step(model, rows))
    return {name: median(values) for name, values in times.items()}


def _peak(workload: dict | None) -> float:
    command = [sys.executable, __file__, json.dumps(workload)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=LIVE_MEMORY).stdout)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if asked is not None:
        workload = Workload(**asked)
        workload.step(*workload.build())
    # The kernel's own peak of this process; `ru_maxrss` would start from the parent's.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 1024)
