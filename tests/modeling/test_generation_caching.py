"""What `generate` keeps from forward to forward: sub-block keys and values, fused commits, the turns of a chat."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from relay_hf import RelayCache, RelayForMaskedDiffusion

from ..conftest import MASK
from .decoding import PAD, decode_alone, new_tokens_of, padded, prompts_of, run
from .test_generation import MODELS, counting_forwards
from .test_reference_generate import comparable_end, decode

FASTER = {
    "sub-block cache": {"use_sub_block_cache": True},
    "fused commits": {"fuse_commits": True},
    "both": {"use_sub_block_cache": True, "fuse_commits": True},
}


@pytest.fixture
def model(make_model: Callable) -> RelayForMaskedDiffusion:
    return make_model(open_channel=True, token_shift=True)


# -- sub-blocks and fused commits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", FASTER)
@pytest.mark.parametrize("name", MODELS)
def test_generate_faster_ways_equal_plain_loop_row_by_row(make_model: Callable, name: str, how: str) -> None:
    model, prompts = make_model(open_channel=True, **MODELS[name]), prompts_of()
    inputs, options = padded(prompts, "mixed"), {"sub_block_size": 4, **FASTER[how]}
    output = run(model, inputs, max_new_tokens=21, **options)
    expected = [decode_alone(model, p, 21, threshold=0.3, **options) for p in prompts]
    assert new_tokens_of(output, inputs["input_ids"].shape[1], PAD, None) == expected


@pytest.mark.parametrize("how", FASTER)
@pytest.mark.parametrize("sub_block_size", [1, 2, 8])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_generate_faster_ways_any_sub_block_equal_plain_loop(
    model: RelayForMaskedDiffusion, how: str, sub_block_size: int, threshold: float
) -> None:
    prompts, options = prompts_of((5, 16)), {"sub_block_size": sub_block_size, **FASTER[how]}
    output = run(model, padded(prompts, "left"), max_new_tokens=19, unmasking_threshold=threshold, **options)
    expected = [decode_alone(model, p, 19, threshold=threshold, **options) for p in prompts]
    assert new_tokens_of(output, 16, PAD, None) == expected


@pytest.mark.parametrize("how", FASTER)
def test_generate_faster_ways_rows_that_stop_leave_the_others_alone(model: RelayForMaskedDiffusion, how: str) -> None:
    prompts, options = prompts_of(), {"sub_block_size": 4, **FASTER[how]}
    alone = [decode_alone(model, p, 30, threshold=0.3, **options) for p in prompts]
    eos = alone[0].tokens[len(alone[0].tokens) // 2]
    inputs = padded(prompts, "left")
    output = run(model, inputs, max_new_tokens=30, eos_token_id=eos, **options)
    expected = [decode_alone(model, p, 30, threshold=0.3, eos_token_id=eos, **options) for p in prompts]
    assert new_tokens_of(output, inputs["input_ids"].shape[1], PAD, eos) == expected
    assert len({len(row.tokens) for row in expected}) > 1  # some rows really left earlier


@pytest.mark.parametrize("how", FASTER)
def test_generate_faster_ways_differ_from_exact_decoding(model: RelayForMaskedDiffusion, how: str) -> None:
    """They change what the network sees, so that tests of equality above have something to tell apart."""
    inputs = padded(prompts_of(), "left")
    options = {"max_new_tokens": 40, "sub_block_size": 4}
    exact, fast = run(model, inputs, **options), run(model, inputs, **options, **FASTER[how])
    assert not torch.equal(exact.sequences, fast.sequences)


def test_generate_sub_block_cache_passes_sub_blocks_only(model: RelayForMaskedDiffusion) -> None:
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, arguments, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    run(model, prompts_of((8,))[0][None], max_new_tokens=8, sub_block_size=4, unmasking_threshold=1.0,
        use_sub_block_cache=True)  # fmt: skip
    # Prefill; the first token is known from it, so that one forward over the block is enough for the first sub-block.
    assert lengths[:4] == [8, 8, 4, 4]
    # The second is passed alone only once its first position is known.
    assert set(lengths[4:]) <= {4, 8}
    assert lengths[4] == 8


def test_generate_fused_commits_one_forward_fewer_per_block(model: RelayForMaskedDiffusion) -> None:
    prompt = prompts_of((8,))[0][None]
    with counting_forwards(model) as seen:
        output = run(model, prompt, max_new_tokens=32, fuse_commits=True)
    assert output.commit_forwards.tolist() == [0]
    assert len(seen) == 1 + int(output.denoise_forwards)
    assert seen.count(False) == 1  # the prefill
    assert output.cache.get_seq_length() == 8 + 3 * 8  # every block but the last is committed by a denoise forward


def test_generate_fused_commits_cache_holds_what_plain_commits_hold(model: RelayForMaskedDiffusion) -> None:
    output = run(model, prompts_of((5,))[0][None], max_new_tokens=30, fuse_commits=True)
    plain = model(output.sequences[:, :24], cache=RelayCache(config=model.config.text_config))
    cache = output.cache
    assert cache.get_seq_length() == 32
    for layer, expected in zip(cache.layers, plain.cache.layers, strict=True):
        torch.testing.assert_close(layer.keys[:, :, :24], expected.keys)
        torch.testing.assert_close(layer.values[:, :, :24], expected.values)


def test_generate_sub_block_cache_fills_canvas(make_model: Callable) -> None:
    """A model without blocks has no committed keys and values, only those of its canvas."""
    model = make_model(block_size=None, open_channel=True)
    canvas = torch.arange(24).view(2, 12).index_fill(1, torch.tensor([1, 2, 5, 6, 7, 11]), MASK)
    options = {"unmasking_policy": "confidence_threshold", "sub_block_size": 4, "use_sub_block_cache": True}
    batch = run(model, canvas, **options)
    rows = [run(model, row[None], **options) for row in canvas]
    assert torch.equal(batch.sequences, torch.cat([row.sequences for row in rows]))
    assert not (batch.sequences == MASK).any()
    assert batch.denoise_forwards.tolist() == [int(row.denoise_forwards) for row in rows]


def sub_block_cases() -> list[dict]:
    return json.loads((Path(__file__).parents[1] / "reference" / "block_cache.json").read_text())["cases"]


@pytest.mark.parametrize("case", sub_block_cases(), ids=lambda case: case["key"])
def test_generate_sub_block_cache_of_the_reference_same_tokens_and_forwards(reference: Path, case: dict) -> None:
    model = RelayForMaskedDiffusion.from_pretrained(reference / "checkpoint")
    index = json.loads((reference / "block_cache.json").read_text())
    vectors = load_file(reference / "block_cache.safetensors")
    ours, output = decode(model, index, vectors, case, use_sub_block_cache=True)
    expected = vectors[f"{case['key']}.row0"]
    end = comparable_end(expected, case["lengths"][0], case, index["config"]["block_size"])
    assert ours[0][:end].tolist() == expected[:end].tolist()
    assert output.denoise_forwards.tolist() == case["denoising_nfe"]


# -- the turns of a chat --------------------------------------------------------------------------------------------


def converse(model: RelayForMaskedDiffusion, cache: RelayCache | None, turns: list[Tensor]) -> list[Tensor]:
    """Each turn's text is what was said so far, and what is added to it."""
    text, texts = torch.empty(1, 0, dtype=torch.long), []
    for said in turns:
        text = run(model, torch.cat([text, said], dim=1), max_new_tokens=13, cache=cache).sequences
        texts.append(text)
    return texts


@pytest.mark.parametrize("name", ["fast_dllm_v2", "no_shift", "shift_pre_norm_all"])
def test_generate_turns_with_one_cache_equal_turns_from_scratch(make_model: Callable, name: str) -> None:
    model = make_model(open_channel=True, **MODELS[name])
    turns = [said[None] for said in prompts_of((9, 3, 8, 1, 16), seed=4)]
    fresh, carried = (converse(model, cache, turns) for cache in (None, RelayCache(config=model.config.text_config)))
    assert all(map(torch.equal, fresh, carried))


def test_generate_next_turn_computes_new_blocks_only(model: RelayForMaskedDiffusion) -> None:
    cache = RelayCache(config=model.config.text_config)
    first = run(model, prompts_of((20,))[0][None], max_new_tokens=20, cache=cache)
    known = cache.get_seq_length()
    assert known == 32
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, arguments, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    prompt = torch.cat([first.sequences, prompts_of((17,), seed=1)[0][None]], dim=1)
    second = run(model, prompt, max_new_tokens=4, cache=cache)
    assert lengths[0] == 56 - known
    assert second.prefill_forwards.tolist() == [1]


def test_generate_next_turn_within_known_blocks_needs_no_prefill(model: RelayForMaskedDiffusion) -> None:
    cache = RelayCache(config=model.config.text_config)
    first = run(model, prompts_of((8,))[0][None], max_new_tokens=12, cache=cache)
    second = run(model, first.sequences[:, :18], max_new_tokens=5, cache=cache)
    assert second.prefill_forwards.tolist() == [0]
    assert torch.equal(second.sequences, run(model, first.sequences[:, :18], max_new_tokens=5).sequences)


@pytest.mark.parametrize("name", ["shift_zeros", "no_shift"])
@pytest.mark.parametrize("changed", [0, 7, 8, 12, 20, 23])
def test_generate_edited_conversation_equals_one_from_scratch(make_model: Callable, name: str, changed: int) -> None:
    """Whatever the cache holds beyond the common beginning is dropped."""
    model = make_model(open_channel=True, **MODELS[name])
    cache = RelayCache(config=model.config.text_config)
    text = run(model, prompts_of((20,))[0][None], max_new_tokens=14, cache=cache).sequences
    edited = text.clone()
    edited[0, changed] = (edited[0, changed] + 1) % 60
    for prompt in (edited, edited[:, : changed + 1]):
        ours = run(model, prompt, max_new_tokens=10, cache=cache)
        assert torch.equal(ours.sequences, run(model, prompt, max_new_tokens=10).sequences)


def test_generate_cache_of_batch_for_next_turn_raises(model: RelayForMaskedDiffusion) -> None:
    inputs = padded(prompts_of((9, 12)), "left")
    cache = run(model, inputs, max_new_tokens=13).cache
    with pytest.raises(ValueError, match="carried from turn to turn of one conversation"):
        run(model, inputs, max_new_tokens=3, cache=cache)
    one = run(model, inputs["input_ids"][1:], max_new_tokens=13).cache
    with pytest.raises(ValueError, match="carried from turn to turn of one conversation"):
        run(model, inputs, max_new_tokens=3, cache=one)
    with pytest.raises(ValueError, match="carried from turn to turn of one conversation"):
        run(model, inputs["input_ids"][1:], max_new_tokens=3, cache=one, do_sample=True,
            num_return_sequences=2)  # fmt: skip
