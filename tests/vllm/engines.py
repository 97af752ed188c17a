"""An engine of vLLM and the model that it serves, asked the same."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.testing import tiny_model

BLOCK, VOCABULARY, STOP = 8, 64, 2
# Heads of 32 are the narrowest that vLLM's attention on CPUs takes.
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}
# At this threshold, tiny models reveal several positions in some steps and one in others.
SURE = {"unmasking_threshold": 0.15, "sub_block_size": 4}
BACKBONES = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}


@dataclass
class Request:
    """What is asked of both.

    Args:
        prompt: tokens.
        new: tokens at most.
        options: of `generate`, and of `extra_args`.
        stops: tokens that end the text.
    """

    prompt: list[int]
    new: int
    options: dict[str, Any] = field(default_factory=lambda: dict(SURE))
    stops: tuple[int, ...] = (STOP,)


@dataclass
class Answer:
    tokens: list[int]
    forwards: int


def make_checkpoint(
    folder: Path, backbone: str = "qwen2", tokenizer: Any = None, generation: dict[str, Any] | None = None, **relay: Any
) -> Any:
    """Saves a tiny model whose channel is open, with defaults of `generate`; returns it."""
    if backbone == "qwen2":
        model = tiny_model(tokenizer, open_channel=True, seed=3, text=TEXT, **relay)
    else:
        known = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "head_dim": 32, "pad_token_id": 0}
        torch.manual_seed(3)
        config = RelayConfig(
            text_config=BACKBONES[backbone](**TEXT, **known), block_size=BLOCK, mask_token_id=VOCABULARY - 1, **relay
        )
        model = RelayForMaskedDiffusion(config).eval()
        for parameter in model.relay.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
    model.generation_config.update(**(generation or {}))
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model


class Engine:
    """vLLM in this process, beside the model that it serves.

    Args:
        model: the model.
        folder: its checkpoint.
        options: of `vllm.LLM`.
    """

    def __init__(self, model: Any, folder: Path, **options: Any) -> None:
        from vllm import LLM

        self.model, self.folder = model, folder
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 256,
            "block_size": 32,  # positions of a page
            "kv_cache_memory_bytes": 32 << 20,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "skip_tokenizer_init": not (folder / "tokenizer_config.json").exists(),
        }
        self.llm = LLM(str(folder), **{**defaults, **options})

    def params(self, request: Request, **more: Any) -> Any:
        """vLLM's parameters of a request."""
        from vllm import SamplingParams

        known = {"max_tokens": request.new, "stop_token_ids": list(request.stops), "extra_args": request.options}
        return SamplingParams(**{**known, "detokenize": False, **more})

    def serve(self, requests: list[Request], **more: Any) -> list[Answer]:
        """What vLLM writes, to all requests at once."""
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        outputs = self.llm.generate(prompts, [self.params(request, **more) for request in requests], use_tqdm=False)
        return [read(output) for output in outputs]

    def expect(self, requests: list[Request], model: Any = None) -> list[Answer]:
        """What `generate` writes, to one request after the other."""
        return [self.generate(model or self.model, request) for request in requests]

    def expect_without_relay(self, requests: list[Request]) -> list[Answer]:
        """What `generate` writes if nothing is carried."""
        return self.expect([Request(r.prompt, r.new, {**r.options, "use_relay": False}, r.stops) for r in requests])

    def metric(self, name: str) -> float:
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)

    @staticmethod
    def generate(model: Any, request: Request) -> Answer:
        """What `generate` writes."""
        output = model.generate(
            torch.tensor([request.prompt]),
            max_new_tokens=request.new,
            eos_token_id=list(request.stops) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            **request.options,
        )
        tokens = output.sequences[0, len(request.prompt) :].tolist()
        end = next((i + 1 for i, token in enumerate(tokens) if token in request.stops), len(tokens))
        return Answer(tokens[:end], int(output.denoise_forwards[0] + output.commit_forwards[0]))


def read(output: Any) -> Answer:
    """The answer in an output of vLLM."""
    (text,) = output.outputs
    return Answer(list(text.token_ids), text.spec_decode_metrics.to_dict()["num_spec_steps"])


def random_prompts(*lengths: int, seed: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY - 2, (length,), generator=generator).tolist() for length in lengths]


def assert_same(engine: Engine, requests: list[Request], **more: Any) -> list[Answer]:
    """Asserts that vLLM writes what `generate` writes, and that both would notice a relay that is off."""
    served, expected = engine.serve(requests, **more), engine.expect(requests)
    for i, (mine, theirs) in enumerate(zip(served, expected, strict=True)):
        assert mine.tokens == theirs.tokens, (i, requests[i])
    if engine.model.config.relay_channel != "none":
        off = engine.expect_without_relay(requests)
        assert [answer.tokens for answer in off] != [answer.tokens for answer in served]
    return served
