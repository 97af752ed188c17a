"""A decoding to be timed, shared by the parts of `decode.py`: model, prompts, the reference's loop, and a recorder.

Random weights would reveal one token per step: their predictions are never sure. So the weight of the final norm is
multiplied by `SHARPNESS`, which multiplies the logits and leaves everything else as it was: the relay's LayerNorm
undoes a scale. The values were chosen once so that a step reveals two to three tokens, as published checkpoints do.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, PreTrainedConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[1]))
from relay_hf import RelayCache, RelayConfig, RelayForMaskedDiffusion, RelayGenerateOutput
from relay_hf.modeling.prefix_relay import Prefix

BLOCK, SUB_BLOCK, THRESHOLD = 32, 8, 0.85
SHARPNESS = {"small": 60.0, "135m": 80.0}


def text_config(name: str) -> PreTrainedConfig:
    """`small`: the vocabulary of Qwen2 on a tiny body. `135m`: the shape of SmolLM2-135M."""
    if name == "135m":
        return LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        )  # fmt: skip
    return Qwen2Config(
        vocab_size=151_936, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip


def build_model(name: str, sharpness: float | None = None) -> RelayForMaskedDiffusion:
    """Random weights and an open channel."""
    torch.manual_seed(0)
    backbone = text_config(name)
    model = RelayForMaskedDiffusion(RelayConfig.fast_dllm_v2(backbone, mask_token_id=backbone.vocab_size - 1)).eval()
    with torch.no_grad():
        model.model.norm.weight *= SHARPNESS[name] if sharpness is None else sharpness
        # As large as an embedding, so that the state matters and does not drown the tokens.
        model.relay.norm.weight.normal_(std=0.02)
    return model


def prompt_lengths(batch: int, ragged: bool) -> list[int]:
    """Ragged: from 40 to 93, so that decoding starts in the second or the third block."""
    return [40 + 53 * row // max(batch - 1, 1) for row in range(batch)] if ragged else [72] * batch


def make_prompts(model: RelayForMaskedDiffusion, batch: int, ragged: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = model.config.mask_token_id
    return [torch.randint(0, tokens, (length,), generator=generator) for length in prompt_lengths(batch, ragged)]


def generate(
    model: RelayForMaskedDiffusion, prompts: list[Tensor], new_tokens: int, **options: Any
) -> RelayGenerateOutput:
    """Ours."""
    padding = {"batch_first": True, "padding_side": "left"}
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(prompt) for prompt in prompts], **padding)
    return model.generate(
        torch.nn.utils.rnn.pad_sequence(prompts, **padding),
        attention_mask=mask,
        max_new_tokens=new_tokens,
        sub_block_size=SUB_BLOCK,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        **{"unmasking_threshold": THRESHOLD, **options},
    )


@torch.no_grad()
def reference_loop(model: RelayForMaskedDiffusion, prompts: list[Tensor], new_tokens: int) -> list[list[int]]:
    """New tokens of every row by the published `batch_sample`: a plain loop over whole blocks and whole vocabularies.

    Every denoise forward passes the whole block of every row, scores all its positions, shifts the logits to the right
    and normalises those of the sub-block. Rows keep their columns: a row whose prompt is longer than that of others
    waits for them. In three things it does what we do, else tokens could not be equal or it might not end: a row
    without masks in the sub-block keeps its state; [MASK] is never revealed; the last block is not committed.
    """
    config, cache, lengths = model.config, DynamicCache(config=model.config.text_config), [len(p) for p in prompts]
    end = max(lengths) + new_tokens
    end += -end % BLOCK
    tokens = torch.full((len(prompts), end), config.mask_token_id)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    begin = min(lengths) // BLOCK * BLOCK

    def forward(begin: int, stop: int, carry: Tensor | None = None, drafts: bool = False) -> tuple[Tensor, Tensor]:
        """Logits and hidden states as the network gives them, not shifted."""
        ids = tokens[:, begin:stop]
        embeds = model.get_input_embeddings()(ids)
        if carry is not None:
            embeds = model.relay(embeds, ids == config.mask_token_id, shift_right(carry))
        blocks = torch.arange(stop) // BLOCK
        sees = blocks[begin:, None] >= blocks  # (L, P + L)
        hidden = model.model(
            inputs_embeds=embeds, attention_mask=None if bool(sees.all()) else sees[None, None],
            cache=Prefix(cache.layers, cache.get_seq_length()) if drafts else cache,
            position_ids=torch.arange(begin, stop)[None], is_causal=False,
        ).last_hidden_state  # fmt: skip
        return model.lm_head(hidden), hidden

    def choose_first(logits: Tensor, column: int) -> None:
        """The last position of a committed block has scored the first one of the next."""
        logits[:, -1, config.mask_token_id] = -torch.inf
        is_masked = tokens[:, column] == config.mask_token_id
        tokens[:, column] = torch.where(is_masked, logits[:, -1].argmax(-1), tokens[:, column])

    if begin:
        choose_first(forward(0, begin)[0], begin)
    while True:
        # Zeros, which a fresh bias turns into nothing: unlike None they let a row begin later than its neighbours.
        stop, carry = begin + BLOCK, torch.zeros(len(prompts), BLOCK, config.text_config.hidden_size)
        for part in range(begin, stop, SUB_BLOCK):
            block = tokens[:, part : part + SUB_BLOCK]  # a view
            while bool((masked := block == config.mask_token_id).any()):
                logits, hidden = forward(begin, stop, carry, drafts=True)
                carry = torch.where(masked.any(-1)[:, None, None], hidden, carry)
                probabilities = shift_right(logits)[:, part - begin : part - begin + SUB_BLOCK].softmax(-1)
                probabilities[..., config.mask_token_id] = -1.0
                best = probabilities.argmax(-1)
                confidence = probabilities.gather(-1, best[..., None])[..., 0].masked_fill(~masked, -1.0)
                surest = torch.zeros_like(masked).scatter(-1, confidence.argmax(-1, keepdim=True), True)
                block.copy_(torch.where(masked & (surest | (confidence > THRESHOLD)), best, block))
        if stop == end:
            break
        choose_first(forward(begin, stop)[0], stop)
        begin = stop
    return [tokens[row, length : length + new_tokens].tolist() for row, length in enumerate(lengths)]


def shift_right(raw: Tensor) -> Tensor:
    """(B, L, X): every position gets the output of the one before; the first keeps its own."""
    return torch.cat([raw[:, :1], raw[:, :-1]], dim=1)


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes that are alive at most while the function runs, of those that it takes itself."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    alive = peak = 0
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        alive += event.self_cpu_memory_usage
        peak = max(peak, alive)
    return peak


class Recorder:
    """The backbone and head forwards of one `generate`, to be replayed with nothing around them."""

    def __init__(self, model: RelayForMaskedDiffusion, prompts: list[Tensor], new_tokens: int) -> None:
        self.model = model
        self.calls: list[tuple[torch.nn.Module, tuple, dict[str, Any], list]] = []
        handles = [
            module.register_forward_pre_hook(self._note, with_kwargs=True) for module in (model.model, model.lm_head)
        ]
        generate(model, prompts, new_tokens)
        for handle in handles:
            handle.remove()

    def _note(self, module: torch.nn.Module, arguments: tuple, kwargs: dict[str, Any]) -> None:
        if module is self.model.lm_head:  # its inputs only, whatever else it was asked to do with them
            self.calls.append((module, arguments[:1], {}, []))
            return
        # Committed keys and values are never written again, so references are enough.
        prefix = kwargs["cache"]
        rows = slice(None) if prefix.rows is None else prefix.rows
        held = [(layer.keys[rows], layer.values[rows]) for layer in prefix.layers if layer.get_seq_length()]
        self.calls.append((module, arguments, kwargs, held))

    @torch.no_grad()
    def replay(self) -> float:
        """Seconds that the forwards take."""
        seconds = 0.0
        for module, arguments, kwargs, held in self.calls:
            if module is self.model.model:
                cache = RelayCache(config=self.model.config.text_config)
                cache.reserve(kwargs["cache"].length + kwargs["inputs_embeds"].shape[1])
                for index, (keys, values) in enumerate(held):
                    cache.update(keys, values, index)
                kwargs = {**kwargs, "cache": cache.prefix()}
            began = time.perf_counter()
            module(*arguments, **kwargs)
            seconds += time.perf_counter() - began
        return seconds
