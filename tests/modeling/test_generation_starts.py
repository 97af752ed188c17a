"""`relay_start`: what the first step of a block receives, against the plain loop and against formulas."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from relay_hf import RelayCache, RelayConfig, RelayForMaskedDiffusion, RelayGenerateOutput

from ..conftest import MASK, VOCAB_SIZE, text_config
from .decoding import PAD, STARTS, decode_alone, new_tokens_of, padded, prompt_of, prompts_of, run

pytestmark = pytest.mark.usefixtures("without_warnings")

MODELS: dict[str, dict[str, Any]] = {
    "layer_norm": {"relay_initial_state": "none", "relay_scope": "all"},
    "layer_norm shift": {"token_shift": True},
    "residual_context": {"relay_temperature": 2.0},
    "residual_context shift": {"relay_temperature": 2.0, "token_shift": True},
    "soft_mask": {},
    "soft_mask shift": {"token_shift": True},
    "layer_norm canvas": {"block_size": None, "token_shift": True, "relay_scope": "all"},
    "residual_context canvas": {"block_size": None},
    "soft_mask canvas": {"block_size": None, "token_shift": True},
}


def build(name: str) -> RelayForMaskedDiffusion:
    """In double precision: in fp32 rounding depends on the batch, and the relay amplifies it until tokens turn over."""
    torch.manual_seed(0)
    channel = name.split()[0]
    fields = {"block_size": 8, "mask_token_id": MASK, "relay_channel": channel, **MODELS[name]}
    model = RelayForMaskedDiffusion(RelayConfig(text_config=text_config(), **fields)).eval()
    if channel == "layer_norm":
        torch.nn.init.normal_(model.relay.norm.weight, std=0.7)
        torch.nn.init.normal_(model.relay.norm.bias, std=0.7)
    if channel == "soft_mask":
        with torch.no_grad():  # a random model is too unsure for the published ones
            model.relay.weight.copy_(torch.tensor([0.9, 1.0, -3.0]))
    return model.double()


def build_reference(model: RelayForMaskedDiffusion) -> RelayForMaskedDiffusion:
    """Smaller, with no channel, and shifted where the model is not."""
    torch.manual_seed(1)
    text = text_config(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    fields = {"block_size": model.config.block_size, "token_shift": not model.config.token_shift}
    config = RelayConfig(text_config=text, mask_token_id=MASK, relay_channel="none", **fields)
    return RelayForMaskedDiffusion(config).eval().double()


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[RelayForMaskedDiffusion, RelayForMaskedDiffusion]]:
    """Models with a reference each."""
    pairs = {name: build(name) for name in MODELS}
    return {name: (model, build_reference(model)) for name, model in pairs.items()}


def start_options(start: str | None, reference: RelayForMaskedDiffusion) -> dict[str, Any]:
    return {"relay_start": start, **({"reference_model": reference} if start == "reference" else {})}


# -- against the plain loop, alone and in batches ----------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Tensor], str, dict[str, Any]]:
    """Prompts, side of the padding, options."""
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    prompts = prompts_of(tuple(lengths), draw(st.integers(0, 100)))
    options: dict[str, Any] = {
        "max_new_tokens": draw(st.integers(1, 20)),
        "unmasking_threshold": draw(st.sampled_from((0.0, 0.3, 1.0))),
        "sub_block_size": draw(st.sampled_from((None, 2, 4))),
        "eos_token_id": draw(st.sampled_from((None, 5, 40))),
    }
    options["use_sub_block_cache"] = options["sub_block_size"] is not None and draw(st.booleans())
    return prompts, draw(st.sampled_from(("left", "right", "mixed"))), options


def started(are_canvases: bool) -> list[tuple[str, str]]:
    """Every model with every start that it has."""
    names = [name for name in MODELS if name.endswith("canvas") == are_canvases]
    return [(name, start) for name in names for start in STARTS[name.split()[0]]]


@pytest.mark.parametrize(("name", "start"), started(are_canvases=False))
@settings(max_examples=8, phases=(Phase.explicit, Phase.generate))
@given(batch=batches(), fuse=st.booleans())
def test_generate_any_start_equals_plain_loop(
    models: dict[str, Any], name: str, start: str, batch: tuple, fuse: bool
) -> None:
    (model, reference), (prompts, side, options) = models[name], batch
    inputs = padded(prompts, side)
    options = {**options, "fuse_commits": fuse, **start_options(start, reference)}
    output = run(model, inputs, **options)
    rows = new_tokens_of(output, inputs["input_ids"].shape[1], PAD, options["eos_token_id"])
    plain = {n: v for n, v in options.items() if n not in ("max_new_tokens", "unmasking_threshold")}
    plain |= {"threshold": options["unmasking_threshold"]}
    for row, prompt in zip(rows, prompts, strict=True):
        assert row == decode_alone(model, prompt, options["max_new_tokens"], **plain)


def rows_of(output: RelayGenerateOutput, inputs: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """What each row got: its text with all that is behind it, and its counts."""
    width, rows = inputs["input_ids"].shape[1], []
    counts = [output.denoise_forwards, output.commit_forwards, output.prefill_forwards]
    counts += [] if output.reference_forwards is None else [output.reference_forwards]
    for row, sequence in enumerate(output.sequences):
        is_text = F.pad(inputs["attention_mask"][row].bool(), (0, len(sequence) - width), value=True)
        rows.append((sequence[is_text].tolist(), [int(count[row]) for count in counts]))
    return rows


@pytest.mark.parametrize(("name", "start"), started(are_canvases=True))
@settings(max_examples=5, phases=(Phase.explicit, Phase.generate))
@given(batch=batches(), seed=st.integers(-(2**63), 2**63 - 100), do_sample=st.booleans())
def test_generate_canvas_any_start_each_row_as_alone(
    models: dict[str, Any], name: str, start: str, batch: tuple, seed: int, do_sample: bool
) -> None:
    (model, reference), (prompts, side, options) = models[name], batch
    generator = torch.Generator().manual_seed(seed % 1000)
    for prompt in prompts:
        prompt[torch.rand(len(prompt), generator=generator) < 0.3] = MASK
    options |= {"do_sample": do_sample, **start_options(start, reference)}

    def rows(prompts: list[Tensor], seeds: list[int]) -> list[tuple[list[int], list[int]]]:
        inputs = padded(prompts, side)
        return rows_of(run(model, inputs, **options, **({"sampling_seeds": seeds} if do_sample else {})), inputs)

    together = rows(prompts, [seed + row for row in range(len(prompts))])
    for row, (text, counts) in enumerate(together):
        [(alone, counts_alone)] = rows([prompts[row]], [seed + row])
        assert text == alone + [PAD] * (len(text) - len(alone))
        assert counts == counts_alone


def test_generate_every_start_decodes_something_else(models: dict[str, Any]) -> None:
    """Else the comparisons above would hold for a start that never enters."""
    for name in ("layer_norm", "residual_context", "soft_mask", "residual_context canvas", "soft_mask canvas"):
        model, reference = models[name]
        texts = [
            run(model, padded(prompts_of(), "left"), max_new_tokens=21, **start_options(start, reference)).sequences
            for start in (None, *STARTS[name.split()[0]])
        ]
        assert len({tuple(text.flatten().tolist()) for text in texts}) == len(texts), name


# -- each start --------------------------------------------------------------------------------------------------------


def test_self_start_of_one_block_equals_formulas(make_model: Callable) -> None:
    """Residual context, one canvas, one position a step: stated without any code of the channel."""
    model = make_model(relay_channel="residual_context", relay_temperature=1.7, block_size=None).double()
    table = model.get_input_embeddings().weight.detach()

    @torch.no_grad()
    def logits_of(ids: Tensor, before: Tensor | None) -> Tensor:
        embeds = table[ids]
        if before is not None:
            tempered = (before / 1.7).softmax(-1)
            share = -(tempered * tempered.log()).sum(-1, keepdim=True) / math.log(VOCAB_SIZE)
            mixed = (1 - share) * embeds + share * (before.softmax(-1) @ table)
            embeds = torch.where(ids[:, None] == MASK, mixed, embeds)
        return model.lm_head(model.model(inputs_embeds=embeds[None], is_causal=False).last_hidden_state)[0]

    ids = prompt_of(12)[0].index_fill(0, torch.tensor([1, 4, 5, 6, 10]), MASK)
    output = run(model, ids[None], relay_start="self", unmasking_policy="fixed_count", unmasking_threshold=1)
    logits = logits_of(ids, None)
    for _ in range(5):
        logits = logits_of(ids, logits)
        probabilities = logits.softmax(-1).index_fill(1, torch.tensor(MASK), 0.0)
        confidence, best = probabilities.max(-1)
        place = confidence.where(ids == MASK, -1.0).argmax()
        ids[place] = best[place]
    assert output.sequences[0].tolist() == ids.tolist()
    assert output.denoise_forwards.tolist() == [6]
    assert output.tokens_per_forward.tolist() == pytest.approx([5 / 6])


@pytest.mark.parametrize("fuse", [False, True])
def test_self_start_counts_one_forward_for_each_row_with_masks(models: dict[str, Any], fuse: bool) -> None:
    model = models["residual_context"][0]
    options = {"unmasking_policy": "fixed_count", "unmasking_threshold": 2, "sub_block_size": 2, "max_new_tokens": 9}
    options["fuse_commits"] = fuse
    plain = run(model, padded(prompts_of((7, 8)), "left"), **options)
    ours = run(model, padded(prompts_of((7, 8)), "left"), **options, relay_start="self", output_history=True)
    # The first row fills the one position that its prompt leaves and a block, the second a block and one position.
    assert plain.denoise_forwards.tolist() == [1 + 4, 4 + 1]
    assert ours.denoise_forwards.tolist() == [2 + 5, 5 + 2]
    assert ours.commit_forwards.equal(plain.commit_forwards)
    assert ours.prefill_forwards.equal(plain.prefill_forwards)
    assert ours.reference_forwards is None
    assert ours.history.revealed_at[0, -9:].unique().tolist() == [2, 4, 5, 6, 7]


@pytest.mark.parametrize("start", STARTS["residual_context"])
def test_start_of_row_that_a_revealed_token_has_ended_costs_nothing(models: dict[str, Any], start: str) -> None:
    """A token-shift model's commit reveals the first token of the next block; if it ends the row, nothing is left."""
    model, reference = models["residual_context shift"]
    prompts = prompts_of((8, 13))
    options = {"max_new_tokens": 16, "unmasking_threshold": 0.3, **start_options(start, reference)}
    stop = int(run(model, prompts[0][None], **options).sequences[0, 8])
    output = run(model, padded(prompts, "left"), **options, eos_token_id=stop)
    assert output.sequences[0, 13:].tolist()[:2] == [stop, PAD]
    counts = [output.denoise_forwards, output.commit_forwards]
    counts += [output.reference_forwards] if start == "reference" else []
    alone = run(model, prompts[1][None], **options, eos_token_id=stop)
    expected = [int(alone.denoise_forwards), int(alone.commit_forwards)]
    expected += [int(alone.reference_forwards)] if start == "reference" else []
    assert [count.tolist() for count in counts] == [[0, count] for count in expected]
    assert output.sequences[1].equal(alone.sequences[0])


@pytest.mark.parametrize("name", ["residual_context", "soft_mask shift"])
def test_reference_that_is_the_model_itself_equals_self_start(models: dict[str, Any], name: str) -> None:
    model, inputs = models[name][0], padded(prompts_of(), "mixed")
    itself = run(model, inputs, max_new_tokens=21, relay_start="self")
    asked = run(model, inputs, max_new_tokens=21, relay_start="reference", reference_model=model)
    assert asked.sequences.equal(itself.sequences)
    assert (asked.denoise_forwards + asked.reference_forwards).equal(itself.denoise_forwards)
    assert asked.reference_forwards.tolist() == [3, 3, 4, 3, 3]


def test_reference_forwards_leave_other_counts_alone(models: dict[str, Any]) -> None:
    model, reference = models["residual_context"]
    steps = {"unmasking_policy": "fixed_count", "unmasking_threshold": 8, "max_new_tokens": 16}
    seen: list[int] = []
    handle = reference.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[1]))
    output = run(model, prompt_of(16), **steps, relay_start="reference", reference_model=reference)
    handle.remove()
    assert seen == [24, 32]
    assert output.reference_forwards.tolist() == [2]
    assert (int(output.denoise_forwards), int(output.commit_forwards), int(output.prefill_forwards)) == (2, 1, 1)
    assert output.tokens_per_forward.tolist() == [4.0]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("start", ["self", "reference"])
def test_start_never_reaches_committed_keys(models: dict[str, Any], start: str, fuse: bool) -> None:
    model, reference = models["residual_context shift"]
    options = {"max_new_tokens": 20, "fuse_commits": fuse, **start_options(start, reference)}
    output = run(model, prompt_of(11), **options)
    cache = RelayCache(config=model.config.text_config)
    with torch.no_grad():
        model(output.sequences[:, :24], cache=cache)
    assert output.cache.get_seq_length() == 24
    for ours, clean in zip(output.cache.layers, cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, clean.keys)
        torch.testing.assert_close(ours.values, clean.values)


@pytest.mark.parametrize("start", ["self", "reference"])
def test_start_of_later_turn_equals_that_without_cache(models: dict[str, Any], start: str) -> None:
    model, reference = models["residual_context shift"]
    options = {"max_new_tokens": 13, **start_options(start, reference)}
    cache = RelayCache(config=model.config.text_config)
    text = run(model, prompt_of(11), cache=cache, **options).sequences
    text = torch.cat([text, prompt_of(5)], dim=1)
    later = run(model, text, cache=cache, **options)
    assert later.sequences.equal(run(model, text, **options).sequences)


# -- the option --------------------------------------------------------------------------------------------------------


def test_start_is_saved_with_the_model(make_model: Callable, tmp_path: Any) -> None:
    model = make_model(open_channel=True)
    expected = run(model, prompt_of(11), max_new_tokens=21, relay_start="self")
    assert model.generation_config.relay_start is None
    model.generation_config.relay_start = "self"
    model.save_pretrained(tmp_path)
    loaded = RelayForMaskedDiffusion.from_pretrained(tmp_path)
    assert loaded.generation_config.relay_start == "self"
    ours = run(loaded, prompt_of(11), max_new_tokens=21)
    assert ours.sequences.equal(expected.sequences)
    assert ours.denoise_forwards.equal(expected.denoise_forwards)
    off = run(loaded, prompt_of(11), max_new_tokens=21, relay_start=None)
    assert int(off.denoise_forwards) < int(ours.denoise_forwards)


@pytest.mark.parametrize("removed", ["zeros", "dirichlet"])
def test_saved_start_that_was_removed_is_refused(make_model: Callable, tmp_path: Any, removed: str) -> None:
    model = make_model(relay_channel="residual_context")
    model.generation_config.relay_start = removed
    model.save_pretrained(tmp_path)
    loaded = RelayForMaskedDiffusion.from_pretrained(tmp_path)
    loaded.model.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match=f"`relay_start='{removed}'` is unknown: choose one of") as raised:
        run(loaded, prompt_of(11), max_new_tokens=4)
    assert ". " not in str(raised.value)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown": (
        "layer_norm",
        {"relay_start": "warm"},
        r"`relay_start='warm'` is unknown: choose one of \['reference', 'self'\]",
    ),
    "zeros, removed": (
        "layer_norm",
        {"relay_start": "zeros"},
        "or `None` for the configuration's `relay_initial_state`",
    ),
    "noise, removed": ("soft_mask", {"relay_start": "dirichlet"}, "`relay_start='dirichlet'` is unknown"),
    "no name": ("layer_norm", {"relay_start": ["self"]}, r"`relay_start=\['self'\]` is unknown"),
    "without relay": ("layer_norm", {"relay_start": "self", "use_relay": False}, "but `use_relay=False`: leave one"),
    "no channel": ("none", {"relay_start": "self"}, "but the model carries none: leave it out"),
    "predictions as hidden state": (
        "layer_norm",
        {"relay_start": "reference", "reference_model": "itself"},
        "'layer_norm'` carries hidden states: choose 'self'",
    ),
    "no reference": ("soft_mask", {"relay_start": "reference"}, "no model to ask: also pass one as `reference_model`"),
    "reference for nothing": (
        "soft_mask",
        {"relay_start": "self", "reference_model": "itself"},
        "`reference_model` is not asked with `relay_start='self'`: set",
    ),
    "reference of another kind": (
        "soft_mask",
        {"relay_start": "reference", "reference_model": torch.nn.Linear(2, 2)},
        "`reference_model` is a Linear, but must be a masked diffusion model",
    ),
    "seeds for nothing": ("soft_mask", {"relay_start": "self", "sampling_seeds": [1]}, "about drawing tokens, but"),
}


def fail(module: Any, arguments: tuple) -> None:
    raise AssertionError("a forward ran before the refusal")


@pytest.mark.parametrize("case", REFUSED)
def test_generate_refused_start_raises(make_model: Callable, case: str) -> None:
    channel, options, message = REFUSED[case]
    model = make_model(relay_channel=channel)
    model.model.register_forward_pre_hook(fail)
    if options.get("reference_model") == "itself":
        options = {**options, "reference_model": model}
    with pytest.raises(ValueError, match=message) as raised:
        model.generate(prompt_of(10), max_new_tokens=4, **options)
    assert ". " not in str(raised.value)


@pytest.mark.parametrize(
    "fields", [{"block_size": 4}, {"mask_token_id": 62}, {"text": {"vocab_size": VOCAB_SIZE + 1}}], ids=str
)
def test_generate_reference_of_other_tokens_or_blocks_raises(make_model: Callable, fields: dict[str, Any]) -> None:
    model, reference = make_model(relay_channel="soft_mask"), make_model(relay_channel="none", **fields)
    model.model.register_forward_pre_hook(fail)
    message = r"\(vocabulary size, `mask_token_id`, `block_size`\) = .*\(64, 63, 8\): choose a reference of the same"
    with pytest.raises(ValueError, match=message):
        model.generate(prompt_of(10), max_new_tokens=4, relay_start="reference", reference_model=reference)
