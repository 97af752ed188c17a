"""`generate` under random options: keeps its promises or refuses in one sentence before any forward; never hangs.

Half of the draws are meant to work and have to. The others get one senseless option on top and have to be refused.
Every fourth call that works is made again in a conversation and ended at a random moment.
"""

import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StaticCache
from transformers.utils import logging

import relay_hf
from relay_hf import RelayCache, RelayForMaskedDiffusion
from relay_hf.modeling.unmasking_relay import ORDERS

from .decoding import STARTS, padded
from .interruptions import check_interruption, check_out_of_time, last_turn
from .senseless_options import REFERENCE, REFUSED, REFUSED_LATE, REFUSED_OTHERWISE, STATIC

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

MODELS: dict[str, dict[str, Any]] = {
    "shift": {"token_shift": True},
    "shift_all": {"token_shift": True, "relay_scope": "all", "relay_initial_state": "none"},
    "no_shift": {"token_shift": False},
    "canvas": {"block_size": None},
    "canvas_shift": {"block_size": None, "token_shift": True},
    "residual": {"relay_channel": "residual_context", "token_shift": True},
    "soft": {"relay_channel": "soft_mask"},
    "canvas_residual": {"block_size": None, "relay_channel": "residual_context"},
}
POLICIES = {
    "confidence_threshold": (0.0, 0.05, 0.5, 1.0, 1),
    "confidence_budget": (0.0, 0.5, 1.7, 100.0),
    "fixed_count": (1, 2, 3.0, 50),
    "time_schedule": (0.5,),
    "entropy_bound": (0.0, 0.5, 4.0, float("inf")),
}


class Recorder:
    """A streamer that takes drafts; holds what it was given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def put_draft(self, value: Tensor) -> None:
        assert value.ndim == 1

    def end(self) -> None:
        self.ended += 1


@dataclass
class Draw:
    """One call of `generate`: (B, P) prompts and their options; how many rows come back, and new tokens at most."""

    name: str
    inputs: dict[str, Tensor]
    options: dict[str, Any]
    rows: int
    new_tokens: int
    masks: int  # [MASK] tokens of the widest prompt


class Drawer:
    """Draws calls that are to work, by a seeded generator."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.rng, self.tokenizer = random.Random(seed), tokenizer
        self.mask = tokenizer.mask_token_id

    def maybe(self, share: float = 0.25) -> bool:
        return self.rng.random() < share

    def draw(self) -> Draw:
        rng, name = self.rng, self.rng.choice(list(MODELS))
        is_canvas, count = "canvas" in name, self.rng.choice((1, 1, 2, 3))
        prompts = [torch.tensor([rng.randrange(250) for _ in range(rng.randint(1, 14))]) for _ in range(count)]
        blanks = is_canvas and self.maybe(0.5)
        if blanks:
            for prompt in prompts:
                prompt[[rng.randrange(len(prompt)) for _ in range(3)]] = self.mask
        inputs = padded(prompts, rng.choice(("left", "right", "mixed")) if count > 1 else "left")
        if count == 1 and self.maybe():
            del inputs["attention_mask"]
        length = inputs["input_ids"].shape[1]
        new = 0 if blanks and self.maybe(0.5) else rng.randint(1, 12)
        options: dict[str, Any] = {"eos_token_id": None, "pad_token_id": self.tokenizer.pad_token_id}
        if new:
            options |= {"max_length": length + new} if self.maybe(0.2) else {"max_new_tokens": new}
        rows = self.sampling(options, count)
        self.ours(options, is_canvas)
        self.start(options, name)
        self.standard(options, rows)
        return Draw(name, inputs, options, rows, new, max(int((prompt == self.mask).sum()) for prompt in prompts))

    def ours(self, options: dict[str, Any], is_canvas: bool) -> None:
        rng = self.rng
        options["unmasking_policy"] = rng.choice(list(POLICIES))
        options["unmasking_threshold"] = rng.choice(POLICIES[options["unmasking_policy"]])
        policy = options["unmasking_policy"]
        if policy == "time_schedule" or (policy in ("fixed_count", "confidence_threshold") and self.maybe(0.4)):
            options["denoising_steps"] = rng.choice((1, 2, 3, 7, 40))
        if policy in ("fixed_count", "time_schedule"):
            options["unmasking_order"] = rng.choice(ORDERS)
        if self.maybe(0.2):
            options["confidence_top_k"] = rng.choice((2, 50, 1000))
        options["sub_block_size"] = rng.choice((None, 1, 2, 4, 8))
        cached = options["sub_block_size"] is not None and self.maybe(0.4)
        options["use_sub_block_cache"] = cached and rng.choice((True, "prefix"))
        options["fuse_commits"] = not is_canvas and self.maybe(0.4)
        options["use_relay"] = self.maybe(0.7)
        options["return_dict_in_generate"] = self.maybe(0.8)
        options["output_history"] = options["return_dict_in_generate"] and self.maybe()

    def start(self, options: dict[str, Any], name: str) -> None:
        if not options["use_relay"] or self.maybe(0.4):
            return
        start = self.rng.choice(STARTS[MODELS[name].get("relay_channel", "layer_norm")])
        options["relay_start"] = start
        if start == "reference":
            options["reference_model"] = REFERENCE

    def sampling(self, options: dict[str, Any], count: int) -> int:
        """Adds options of sampling; returns how many rows there will be."""
        rng = self.rng
        if not self.maybe(0.4):
            return count
        options["do_sample"] = True
        copies = rng.choice((1, 1, 1, 2, 3))
        if copies > 1:
            options["num_return_sequences"] = copies
        if self.maybe(0.4):
            options["sampling_seeds"] = [rng.randrange(-(2**63), 2**63) for _ in range(count * copies)]
        if self.maybe(0.3):
            hottest = rng.uniform(0.2, 2.0)
            options |= {"t_max": hottest, "t_min": hottest * rng.uniform(0.1, 1.0)}
        elif self.maybe(0.4):
            options["temperature"] = rng.choice((0.1, 0.7, 1.0, 5.0))
        warpers = {"top_k": (1, 5, 1000), "top_p": (0.1, 0.9, 1.0), "min_p": (0.0, 0.2, 1.0), "typical_p": (0.1, 0.9),
                   "epsilon_cutoff": (0.01,), "eta_cutoff": (0.01,), "top_h": (0.5,)}  # fmt: skip
        for name in rng.sample(list(warpers), rng.choice((0, 0, 1, 2))):
            options[name] = rng.choice(warpers[name])
        return count * copies

    def standard(self, options: dict[str, Any], rows: int) -> None:
        rng = self.rng
        if self.maybe(0.4):
            options["eos_token_id"] = rng.choice((5, [5], [7, 11, 5], list(range(100))))
        choices = {
            "repetition_penalty": (0.7, 1.0, 1.3),
            "bad_words_ids": ([[3], [8]], [[9]]),
            "suppress_tokens": ([1, 2, 3], list(range(100, 200))),
            "sequence_bias": ([[[5], 2.0]], {(6,): -3.0, (7,): 50.0}),
            "renormalize_logits": (True,),
            "remove_invalid_values": (True,),
            "use_cache": (True, None),
            "cache_implementation": ("dynamic", None),
            "num_beams": (1,),
            "early_stopping": (False,),
            "cache": ("new",),
        }
        for name in rng.sample(list(choices), rng.choice((0, 0, 0, 1, 2))):
            options[name] = rng.choice(choices[name])
        if self.maybe(0.1):
            options |= {"stop_strings": rng.choice(("a", ["b", "cd"])), "tokenizer": self.tokenizer}
        if rows == 1 and self.maybe(0.2):
            options["streamer"] = Recorder()


class TooManyForwardsError(Exception):
    """The step bound does not hold."""


class Bound:
    """Counts forwards of the backbones; fails beyond `limit`."""

    def __init__(self) -> None:
        self.count = self.limit = 0

    def __call__(self, module: Any, arguments: tuple) -> None:
        self.count += 1
        if self.count > self.limit:
            raise TooManyForwardsError(f"more than {self.limit} forwards")


def most_denoise_forwards(draw: Draw) -> int:
    """Every step reveals a position of every row that takes part; a row's last block may be masked to its end.

    One forward more may start each of up to three blocks.
    """
    starts = 3 if draw.options.get("relay_start") == "self" else 0
    # A schedule may leave out steps; on a canvas clues may lie in as many sub-blocks.
    empty = 0
    if draw.options["unmasking_policy"] == "time_schedule" and isinstance(draw.options.get("denoising_steps"), int):
        empty = draw.options["denoising_steps"] * (draw.masks + draw.new_tokens + 7)
    return draw.masks + draw.new_tokens + starts + empty + (0 if "canvas" in draw.name else 7)


def call(model: RelayForMaskedDiffusion, reference: RelayForMaskedDiffusion, draw: Draw, bound: Bound) -> Any:
    options = dict(draw.options)
    if options.get("reference_model") == REFERENCE:
        options["reference_model"] = reference
    if options.get("cache") == "new":
        options["cache"] = RelayCache(config=model.config.text_config)
    if options.get("cache") == STATIC:
        options["cache"] = StaticCache(config=model.config.text_config, max_cache_len=64)
    if "assistant_model" in options:
        options["assistant_model"] = model
    # At worst rows take part one after the other; at most four blocks are committed, and one prefill runs.
    bound.count, bound.limit = 0, draw.rows * most_denoise_forwards(draw) + 5
    return model.generate(**{**draw.inputs, **options})


def interrupt(model: RelayForMaskedDiffusion, reference: RelayForMaskedDiffusion, draw: Draw, bound: Bound) -> str:
    """Makes a call in a conversation and ends it before its time; returns how it ended."""
    rng, cache = random.Random(str(draw.inputs)), RelayCache(config=model.config.text_config)
    options, inputs, bound.limit = {**draw.options, "use_cache": True}, draw.inputs, 10**9
    options.pop("streamer", None)
    if options.get("reference_model") == REFERENCE:
        options["reference_model"] = reference
    if draw.rows == 1 and "canvas" not in draw.name and rng.random() < 0.7:
        inputs = last_turn(model, inputs, cache)
        options.pop("max_length", None)
        options["max_new_tokens"] = draw.new_tokens

    def generate(**others: Any) -> Any:
        return model.generate(**{**inputs, **options, **others})

    if rng.random() < 0.2:
        check_out_of_time(generate, cache, rng)
        return "out of time"
    return "interrupted" if check_interruption(model, generate, cache, rng) else "finished"


def most_in_vain(draw: Draw, length: int) -> int:
    """Forwards that no row takes part in: those behind a stop token that the commit of a block has revealed."""
    shifts = MODELS[draw.name].get("token_shift") and "canvas" not in draw.name
    if not shifts or draw.options["fuse_commits"] or length % 8 != 1:
        return 0
    return 2 if draw.options.get("relay_start") == "self" else 1


def check(output: Any, draw: Draw, bound: Bound, mask: int) -> None:
    """What every call promises."""
    options, prompts = draw.options, draw.inputs["input_ids"]
    sequences = output.sequences if options["return_dict_in_generate"] else output
    width, stops = prompts.shape[1], options["eos_token_id"]
    may_stop = stops is not None or "stop_strings" in options
    copies = options.get("num_return_sequences", 1)
    kept = prompts.repeat_interleave(copies, dim=0)
    assert len(sequences) == draw.rows
    assert torch.equal(sequences[:, :width].where(kept != mask, mask), kept)
    new = sequences[:, width:]
    assert new.shape[1] <= draw.new_tokens if may_stop else new.shape[1] == draw.new_tokens
    assert not (sequences == mask).any()
    stops = [] if stops is None else [stops] if isinstance(stops, int) else stops
    # A bad word that is a stop token as well is none to transformers.
    bad_words = {word for [word] in options.get("bad_words_ids", [])} - set(stops)
    banned = {*options.get("suppress_tokens", []), *bad_words}
    counts = []
    for row in new.tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        assert row[end:] == [options["pad_token_id"]] * (len(row) - end)
        assert not banned & set(row[:end])
        counts.append(end)
    if new.shape[1] < draw.new_tokens and "stop_strings" not in options:
        assert max(counts) == new.shape[1]
        assert set(new[:, -1].tolist()) & set(stops)
    if streamer := options.get("streamer"):
        shown = [*prompts[0].tolist(), *(new if draw.new_tokens else sequences)[0].tolist()]
        assert (streamer.tokens, streamer.ended) == (shown, 1)
    if not options["return_dict_in_generate"]:
        return
    denoise, commit, prefill = output.denoise_forwards, output.commit_forwards, output.prefill_forwards
    assert int(denoise.max()) <= most_denoise_forwards(draw)
    assert not (options["fuse_commits"] and commit.any())
    assert set(prefill.tolist()) <= {0, 1}
    if options.get("relay_start") == "reference":
        assert output.reference_forwards.le(3).all()
        assert output.reference_forwards.le(denoise).all()
    else:
        assert output.reference_forwards is None
    if draw.rows == 1:
        length = int(draw.inputs.get("attention_mask", prompts >= 0).sum()) + counts[0]
        assert 0 <= bound.count - int(denoise + commit + prefill) <= most_in_vain(draw, length)
    assert int((denoise + commit).max()) <= bound.count <= int((denoise + commit).sum()) + 1
    if not may_stop:
        filled = ((kept == mask).sum(-1) + draw.new_tokens) / (denoise + commit + prefill).clamp(min=1)
        torch.testing.assert_close(output.tokens_per_forward, filled)
    if options["output_history"]:
        assert output.history.revealed_at.shape == sequences.shape
        assert output.history.revealed_at.amax(-1).le(denoise).all()
        assert output.history.confidence.ge(0).all()
        assert output.history.confidence.le(1 + 1e-5).all()


def check_refusal(error: Exception, senseless: dict[str, Any], bound: Bound) -> None:
    """Ours say in one sentence what is wrong and what to do; nobody lets a forward run first."""
    assert bound.count <= (3 if senseless in REFUSED_LATE else 0)
    assert len(str(error)) > 20
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if Path(raised_in).is_relative_to(Path(relay_hf.__file__).parent):
        assert isinstance(error, ValueError)
        assert str(error).endswith(".")
        assert ". " not in str(error)
        assert "\n" not in str(error)


def run_draws(make_model: Callable, tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> Counter:
    text = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    text |= {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    fields = {"text": text, "mask_token_id": tokenizer.mask_token_id}
    models = {
        name: make_model(open_channel="relay_channel" not in options, **fields, **options)
        for name, options in MODELS.items()
    }
    references = {size: make_model(relay_channel="none", block_size=size, seed=1, **fields) for size in (8, None)}
    bound = Bound()
    for model in models.values():
        model.model.register_forward_pre_hook(bound)
    drawer, outcomes = Drawer(tokenizer, seed), Counter()
    torch.manual_seed(seed)
    for number in range(count):
        draw, senseless, error = drawer.draw(), {}, None
        expected: type[Exception] | None = None
        if number % 2:
            expected, senseless = ValueError, drawer.rng.choice([*REFUSED, *REFUSED_OTHERWISE, *REFUSED_LATE])
            if isinstance(senseless, tuple):
                expected, senseless = senseless
            draw.options |= senseless
        try:
            model = models[draw.name]
            output = call(model, references[model.config.block_size], draw, bound)
        except Exception as raised:
            error = raised
        outcomes[type(error).__name__] += 1
        try:
            if expected is None:
                assert error is None, repr(error)
                check(output, draw, bound, tokenizer.mask_token_id)
                if number % 8 == 0:
                    outcomes[interrupt(model, references[model.config.block_size], draw, bound)] += 1
            else:
                assert isinstance(error, expected | ValueError), repr(error)
                check_refusal(error, senseless, bound)
        except Exception as failure:
            failure.add_note(f"draw {number} of seed {seed}: {draw}")
            raise
    return outcomes


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers warns of most of what is drawn here."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    yield
    logging.set_verbosity(before)


def test_generate_random_options_work_or_are_refused(make_model: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
    outcomes = run_draws(make_model, tokenizer, 400, seed=0)
    assert outcomes["NoneType"] == 200
    assert outcomes["ValueError"] > 160
    assert outcomes["interrupted"] > 15
    assert outcomes["out of time"] > 2


@pytest.mark.slow
def test_generate_ten_thousand_random_options_work_or_are_refused(
    make_model: Callable, tokenizer: PreTrainedTokenizerFast
) -> None:
    outcomes = run_draws(make_model, tokenizer, 10_000, seed=1)
    assert outcomes["NoneType"] == 5000
    assert outcomes["interrupted"] > 500
