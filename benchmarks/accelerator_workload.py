"""A device to be measured, shared by the parts of `accelerator.py`: shapes, models, clocks and trainers."""

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, Qwen2Config, TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the test device
from relay_hf import RelayCache, RelayConfig, RelayForMaskedDiffusion, RelayTrainer, RelayTrainerConfig
from relay_hf.tasks.sudoku import make_sudoku_tokenizer

BLOCK, SUB_BLOCK = 32, 8


class Bench:
    """The device, the shapes, and how to measure on it.

    Args:
        device: "cuda", another accelerator of torch, "cpu", or "fakegpu".
        tiny: shapes that take seconds on a CPU.
    """

    def __init__(self, device: str, tiny: bool) -> None:
        self.fakegpu: Any = None
        if device == "fakegpu":
            import pytest

            from tests.device import fakegpu

            self.fakegpu = fakegpu
            fakegpu.load()
            fakegpu.default_to(fakegpu.NAME, pytest.MonkeyPatch())
        self.device, self.tiny = torch.device(device), tiny
        self.repeats = 2 if tiny else 10
        self.prompt, self.many = (64, 3) if tiny else (2048, 32)
        self.new_tokens, self.length = (40, 256) if tiny else (128, 2048)

    def text_config(self) -> Qwen2Config:
        """Qwen2 1.5B, whose shape Fast-dLLM v2 has."""
        shape = {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
        heads = {"num_attention_heads": 12, "num_key_value_heads": 2}
        if self.tiny:
            shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return Qwen2Config(**shape, **heads, max_position_embeddings=32_768, tie_word_embeddings=False)

    def model(self, dtype: torch.dtype) -> RelayForMaskedDiffusion:
        """Random weights, made on the device."""
        text = self.text_config()
        torch.manual_seed(0)
        config = RelayConfig.fast_dllm_v2(text, mask_token_id=text.vocab_size - 1)
        with self.device:
            model = RelayForMaskedDiffusion(config).to(dtype)
        model.relay.float()
        return model.to(self.device)

    def idle(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def seconds(self, run: Callable[[], Any]) -> float:
        self.idle()
        began = time.perf_counter()
        run()
        self.idle()
        return time.perf_counter() - began

    def milliseconds(self, run: Callable[[], Any]) -> float:
        """Median time of a program."""
        times = [self.seconds(run) for _ in range(3 + self.repeats)][3:]
        return round(1000 * median(times), 3)

    def launches(self, run: Callable[[], Any]) -> dict[str, Any]:
        """Kernels that a program launches, and for how many milliseconds they keep the device busy."""
        if self.fakegpu is not None:
            with self.fakegpu.count() as counts:
                run()
            return {"launches": counts.launches, "busy_ms": "the test device knows no time"}
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            self.seconds(run)
        kernels = [event for event in profile.events() if event.device_type.name == self.device.type.upper()]
        busy = sum(event.self_device_time_total for event in kernels) / 1000
        return {"launches": len(kernels), "busy_ms": round(busy, 3)}

    def waits(self, run: Callable[[], Any]) -> dict[str, int] | str:
        """The lines at which a program lets the host wait for the device, and how often."""
        if self.fakegpu is not None:
            with self.fakegpu.count() as counts:
                run()
            return dict(counts.waits.most_common())
        if self.device.type != "cuda":
            return "only CUDA reports waits"
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
        return dict(Counter(f"{Path(wait.filename).name}:{wait.lineno}" for wait in waits).most_common())

    def replayed(self, run: Callable[[], Any]) -> float:
        """Median time of a program as a graph of its kernels.

        Raises:
            NotImplementedError: the device has no graphs.
        """
        if self.device.type != "cuda":
            raise NotImplementedError(f"{self.device.type} has no graphs of kernels")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return self.milliseconds(graph.replay)

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        """Most bytes that live on the device while a program runs."""
        if self.device.type == "cpu":
            run()
            return None
        module = torch.get_device_module(self.device)
        module.empty_cache()
        module.reset_peak_memory_stats()
        run()
        return module.max_memory_allocated()

    def prompts(self, lengths: list[int]) -> dict[str, Tensor]:
        """Random prompts, padded on the left."""
        width, last = max(lengths), self.text_config().vocab_size - 1
        mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
        ids = torch.randint(1, last, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def generate(self, model: Any, lengths: list[int], **options: Any) -> Any:
        """`generate` that reveals two tokens of each row in a step, whatever the weights."""
        rule = {"unmasking_policy": "fixed_count", "unmasking_threshold": 2, "eos_token_id": None, "pad_token_id": 0}
        options = {"max_new_tokens": self.new_tokens, "return_dict_in_generate": True, **rule, **options}
        return model.generate(**self.prompts(lengths), **options)

    def batches(self) -> dict[str, list[int]]:
        spread = [self.prompt - 97 * row % (self.prompt // 2) for row in range(self.many)]
        return {"1": [self.prompt], f"{self.many} even": [self.prompt] * self.many, f"{self.many} ragged": spread}


class DenoiseForward:
    """A denoise forward with a state behind a committed prompt, whose first sub-block is scored.

    Args:
        bench: the device.
        model: on it, in evaluation mode.
        rows: of the batch.
    """

    def __init__(self, bench: Bench, model: Any, rows: int) -> None:
        self.model, device = model, bench.device
        ids = bench.prompts([bench.prompt] * rows)["input_ids"]
        self.cache = RelayCache(config=model.config.text_config)
        self.cache.reserve(bench.prompt + BLOCK)
        with torch.no_grad():
            model(ids, cache=self.cache, logits_to_keep=ids.new_empty(0), output_relay_state=False)
        self.block = torch.full((rows, BLOCK), model.config.mask_token_id, device=device)
        self.state = torch.randn(rows, BLOCK, model.config.relay_state_width, device=device)
        row = torch.arange(rows, device=device).repeat_interleave(SUB_BLOCK)
        self.scored = row, torch.arange(SUB_BLOCK, device=device).repeat(rows)

    @torch.no_grad()
    def __call__(self) -> Any:
        prefix, scored = self.cache.prefix(), self.scored
        output = self.model(self.block, cache=prefix, relay_state=self.state, logits_to_keep=scored, unscored=True)
        return self.model.best_tokens(output.head_inputs)


class Clock(TrainerCallback):
    """Seconds of every optimizer step.

    Args:
        bench: the device.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.began = bench, 0.0
        self.times: list[float] = []

    def on_step_begin(self, *arguments: Any, **kwargs: Any) -> None:
        self.bench.idle()
        self.began = time.perf_counter()

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        self.bench.idle()
        self.times.append(time.perf_counter() - self.began)


def make_trainer(bench: Bench, model: Any, steps: int, blocks: int, checkpointing: bool = False) -> RelayTrainer:
    """A trainer of the relay objective, K = 2, with two rows a step, of which the last blocks are learned."""
    last = bench.text_config().vocab_size - 1
    ids = torch.randint(1, last, (8, bench.length), generator=torch.Generator().manual_seed(0))
    labels = ids.where(torch.arange(bench.length) >= bench.length - blocks * BLOCK, -100)
    on_cpu = bench.device.type == "cpu"
    with TemporaryDirectory() as folder:  # nothing is written
        arguments = RelayTrainerConfig(
            folder, objective="relay", rollout_steps=2, max_steps=steps, per_device_train_batch_size=2,
            bf16=not on_cpu, use_cpu=on_cpu, gradient_checkpointing=checkpointing, logging_strategy="no",
            save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False, max_length=None,
            staggered_start=False, unmasking_policy="fixed_count", unmasking_threshold=1,
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
        trainer = RelayTrainer(model, arguments, train_dataset=data, processing_class=make_sudoku_tokenizer(6))
    trainer.remove_callback(PrinterCallback)
    return trainer
