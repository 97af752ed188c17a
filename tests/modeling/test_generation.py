"""`generate`: equal to a plain loop row by row, whoever shares the batch, and what it promises at the edges."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
)

from relay_hf import RelayCache, RelayForMaskedDiffusion

from ..conftest import MASK, VOCAB_SIZE
from .decoding import LENGTHS, PAD, decode_alone, new_tokens_of, padded, prompt_of, prompts_of, run

# Every switch that changes how a state reaches the next step, each with an open channel.
MODELS: dict[str, dict[str, Any]] = {
    "fast_dllm_v2": {"token_shift": True, "relay_initial_state": "none"},
    "shift_zeros": {"token_shift": True},
    "shift_pre_norm_all": {"token_shift": True, "relay_readout": "pre_norm", "relay_scope": "all"},
    "shift_inner_layer": {"token_shift": True, "relay_readout": "pre_norm", "relay_layer": 0},
    "no_shift": {"token_shift": False},
    "no_shift_all_pre_norm": {"token_shift": False, "relay_readout": "pre_norm", "relay_scope": "all"},
}


@pytest.fixture
def model(make_model: Callable) -> RelayForMaskedDiffusion:
    return make_model(open_channel=True, token_shift=True)


@contextmanager
def counting_forwards(model: RelayForMaskedDiffusion) -> Iterator[list[bool]]:
    """One entry a forward: whether it was a draft."""
    seen: list[bool] = []

    def note(module: Any, arguments: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs.get("unscored", False))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def prefer_mask_token(model: RelayForMaskedDiffusion, by: float) -> None:
    """From now on the head likes the mask token best."""
    bonus = by * torch.nn.functional.one_hot(torch.tensor(MASK), VOCAB_SIZE)
    model.lm_head.register_forward_hook(lambda module, arguments, logits: logits + bonus)


# -- equal to a plain loop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_generate_ragged_batch_equals_plain_loop_row_by_row(make_model: Callable, name: str, side: str) -> None:
    model, prompts = make_model(open_channel=True, **MODELS[name]), prompts_of()
    inputs = padded(prompts, side)
    ours = new_tokens_of(
        run(model, inputs, max_new_tokens=21, sub_block_size=4), inputs["input_ids"].shape[1], PAD, None
    )
    assert ours == [decode_alone(model, p, 21, threshold=0.3, sub_block_size=4) for p in prompts]


def test_generate_models_of_these_tests_use_their_state(make_model: Callable) -> None:
    """Else the comparison above could not tell a lost or foreign state; the threshold is neither 0 nor 1 to them."""
    for options in MODELS.values():
        model, prompts = make_model(open_channel=True, **options), prompts_of()
        on, off = (run(model, padded(prompts, "left"), max_new_tokens=21, use_relay=use) for use in (True, False))
        assert not torch.equal(on.sequences, off.sequences)
        assert any(4 < count < 21 for count in on.denoise_forwards.tolist())


@pytest.mark.parametrize("use_relay", [False, True])
@pytest.mark.parametrize("sub_block_size", [None, 8, 2])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.0])
def test_generate_options_equal_plain_loop(
    model: RelayForMaskedDiffusion, use_relay: bool, sub_block_size: int | None, threshold: float
) -> None:
    prompts, options = prompts_of((5, 16)), {"use_relay": use_relay, "sub_block_size": sub_block_size}
    output = run(model, padded(prompts, "left"), max_new_tokens=19, unmasking_threshold=threshold, **options)
    expected = [decode_alone(model, p, 19, threshold=threshold, **options) for p in prompts]
    assert new_tokens_of(output, 16, PAD, None) == expected


@pytest.mark.parametrize("budget", [0.0, 0.7, 3.0])
def test_generate_confidence_budget_equals_plain_loop(model: RelayForMaskedDiffusion, budget: float) -> None:
    prompts, policy = prompts_of((5, 16)), "confidence_budget"
    options = {"unmasking_policy": policy, "unmasking_threshold": budget, "sub_block_size": None}
    ours = new_tokens_of(run(model, padded(prompts, "left"), max_new_tokens=19, **options), 16, PAD, None)
    assert ours == [decode_alone(model, p, 19, threshold=budget, policy=policy) for p in prompts]


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@pytest.mark.parametrize("name", ["fast_dllm_v2", "no_shift"])
def test_generate_rows_that_stop_leave_the_others_alone(make_model: Callable, name: str, side: str) -> None:
    model, prompts = make_model(open_channel=True, **MODELS[name]), prompts_of()
    alone = [decode_alone(model, p, 30, threshold=0.3, sub_block_size=4) for p in prompts]
    eos = alone[0].tokens[len(alone[0].tokens) // 2]
    inputs = padded(prompts, side)
    output = run(model, inputs, max_new_tokens=30, sub_block_size=4, eos_token_id=eos)
    ours = new_tokens_of(output, inputs["input_ids"].shape[1], PAD, eos)
    expected = [decode_alone(model, p, 30, threshold=0.3, sub_block_size=4, eos_token_id=eos) for p in prompts]
    assert ours == expected
    assert len({len(row.tokens) for row in ours}) > 1  # some rows really left earlier


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [2, 0, 4, 1, 3], [3, 3, 0, 0, 3]])
def test_generate_any_order_of_rows_same_rows(model: RelayForMaskedDiffusion, order: list[int]) -> None:
    inputs, eos = padded(prompts_of(), "left"), 17
    base = run(model, inputs, max_new_tokens=25, eos_token_id=eos)
    mixed = run(model, {name: tensor[order] for name, tensor in inputs.items()}, max_new_tokens=25, eos_token_id=eos)
    rows = [new_tokens_of(output, inputs["input_ids"].shape[1], PAD, eos) for output in (base, mixed)]
    assert rows[1] == [rows[0][row] for row in order]


def test_generate_zero_init_channel_same_as_without_relay(make_model: Callable) -> None:
    model, inputs = make_model(token_shift=True), padded(prompts_of(), "left")
    on, off = (run(model, inputs, max_new_tokens=20, use_relay=use) for use in (True, False))
    assert torch.equal(on.sequences, off.sequences)


def test_generate_no_channel_same_as_without_relay(make_model: Callable) -> None:
    inputs, options = padded(prompts_of(), "left"), {"token_shift": True, "seed": 3}
    without = run(make_model(relay_channel="none", **options), inputs, max_new_tokens=20)
    switched_off = run(make_model(open_channel=True, **options), inputs, max_new_tokens=20, use_relay=False)
    assert torch.equal(without.sequences, switched_off.sequences)


def test_generate_committed_keys_and_values_do_not_depend_on_state(model: RelayForMaskedDiffusion) -> None:
    """They are those of a clean forward over the finished text."""
    output = run(model, prompt_of(5), max_new_tokens=27)
    cache, committed = output.cache, output.cache.get_seq_length()
    assert committed == 24
    with torch.no_grad():
        clean = model(output.sequences[:, :committed], use_cache=True).cache
    for ours, plain in zip(cache.layers, clean.layers, strict=True):
        torch.testing.assert_close(ours.keys, plain.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.values, plain.values, atol=1e-5, rtol=1e-5)


# -- lengths and counts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16])
@pytest.mark.parametrize("new", [1, 7, 8, 9, 20])
def test_generate_exactly_max_new_tokens(model: RelayForMaskedDiffusion, length: int, new: int) -> None:
    output = run(model, prompt_of(length), max_new_tokens=new)
    assert output.sequences.shape == (1, length + new)
    assert (output.sequences[:, length:] != MASK).all()


def test_generate_prompt_kept(model: RelayForMaskedDiffusion) -> None:
    inputs = padded(prompts_of(), "mixed")
    output = run(model, inputs, max_new_tokens=5)
    assert torch.equal(output.sequences[:, :-5], inputs["input_ids"])


def test_generate_fewer_tokens_is_beginning_of_more(model: RelayForMaskedDiffusion) -> None:
    inputs = padded(prompts_of(), "left")
    longest = run(model, inputs, max_new_tokens=24).sequences
    for new in (1, 6, 13):
        shorter = run(model, inputs, max_new_tokens=new).sequences
        assert torch.equal(shorter, longest[:, : shorter.shape[1]])


def test_generate_prompt_of_one_block_depends_on_it(model: RelayForMaskedDiffusion) -> None:
    """The reference ignores such a prompt."""
    texts = {
        tuple(run(model, prompt[None], max_new_tokens=8).sequences[0, 8:].tolist()) for prompt in prompts_of((8,) * 5)
    }
    assert len(texts) == 5


def test_generate_counts_are_forwards_that_ran(model: RelayForMaskedDiffusion) -> None:
    with counting_forwards(model) as drafts:
        output = run(model, prompt_of(13), max_new_tokens=21)
    assert output.denoise_forwards.tolist() == [sum(drafts)]
    # Columns 8 to 34 are four and a bit blocks; nothing is committed behind the last one.
    assert (output.prefill_forwards.tolist(), output.commit_forwards.tolist()) == ([1], [3])
    assert len(drafts) == sum(drafts) + 4
    assert output.tokens_per_forward.tolist() == pytest.approx([21 / len(drafts)])


def test_generate_forward_behind_a_stop_token_of_a_commit_is_no_ones(model: RelayForMaskedDiffusion) -> None:
    """The commit that reveals it is not waited for, so that the block's first forward runs; no row takes part in it."""
    text = run(model, prompt_of(8), max_new_tokens=24).sequences[0].tolist()
    assert text[16] not in text[8:16]
    shorter = run(model, prompt_of(8), max_new_tokens=8)
    with counting_forwards(model) as drafts:
        output = run(model, prompt_of(8), max_new_tokens=24, eos_token_id=text[16])
    assert output.sequences[0].tolist() == text[:17]
    assert output.denoise_forwards.equal(shorter.denoise_forwards)
    assert (output.commit_forwards.tolist(), sum(drafts)) == ([1], output.denoise_forwards.item() + 1)


def test_generate_no_forward_beyond_last_needed_sub_block(model: RelayForMaskedDiffusion) -> None:
    """Position 8 comes from the prefill; the rest of its sub-block takes three forwards, the block would take seven."""
    with counting_forwards(model) as drafts:
        run(model, prompt_of(8), max_new_tokens=4, sub_block_size=4, unmasking_threshold=1.0)
    assert drafts == [False, True, True, True]


def test_generate_row_waiting_for_others_costs_it_nothing(model: RelayForMaskedDiffusion) -> None:
    short, long = prompts_of((9, 15))
    output = run(model, padded([short, long], "left"), max_new_tokens=1, unmasking_threshold=1.0, sub_block_size=1)
    assert output.denoise_forwards.tolist() == [1, 1]
    output = run(model, padded([short, long], "left"), max_new_tokens=4, unmasking_threshold=1.0, sub_block_size=1)
    assert output.commit_forwards.tolist() == [0, 1]


def test_generate_max_length_counts_prompt(model: RelayForMaskedDiffusion) -> None:
    assert run(model, prompt_of(5), max_length=12).sequences.shape == (1, 12)


def test_generate_without_dict_returns_sequences(model: RelayForMaskedDiffusion) -> None:
    prompt = prompt_of(5)
    tokens = model.generate(prompt, max_new_tokens=6, unmasking_threshold=0.3, eos_token_id=None)
    assert torch.equal(tokens, run(model, prompt, max_new_tokens=6).sequences)


# -- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True}, {"do_sample": True, "top_k": 1}, {"do_sample": True, "top_p": 0.1}]
)
@pytest.mark.parametrize("token_shift", [False, True])
def test_generate_mask_token_preferred_by_head_never_generated(
    make_model: Callable, token_shift: bool, sampling: dict[str, Any]
) -> None:
    model = make_model(open_channel=True, token_shift=token_shift)
    prefer_mask_token(model, 1e4)
    output = run(model, padded(prompts_of(), "left"), max_new_tokens=20, **sampling)
    assert not (output.sequences[:, -20:] == MASK).any()


def test_generate_sampling_brings_mask_back_by_processor_never_generated(model: RelayForMaskedDiffusion) -> None:
    class PreferMask(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.index_fill(-1, torch.tensor([MASK]), 1e4)

    output = run(
        model, padded(prompts_of(), "left"), max_new_tokens=20, do_sample=True, logits_processor=[PreferMask()]
    )
    assert not (output.sequences[:, -20:] == MASK).any()


def test_generate_cold_sampling_equals_greedy_in_every_row(model: RelayForMaskedDiffusion) -> None:
    """The reference samples from its first row only. At threshold 0 confidence plays no part, only the token does."""
    options = {"max_new_tokens": 20, "unmasking_threshold": 0.0}
    inputs = padded(prompts_of(), "left")
    cold = run(model, inputs, do_sample=True, temperature=1e-4, **options)
    assert torch.equal(cold.sequences, run(model, inputs, **options).sequences)


def test_generate_sampling_rows_of_same_prompt_differ(model: RelayForMaskedDiffusion) -> None:
    torch.manual_seed(0)
    prompt = prompt_of(5)
    output = run(model, prompt, max_new_tokens=12, do_sample=True, temperature=3.0, num_return_sequences=4)
    assert len(output.denoise_forwards) == 4
    assert len({tuple(row) for row in output.sequences.tolist()}) == 4
    assert (output.sequences[:, :5] == prompt).all()


def test_generate_sampling_same_seed_same_text(model: RelayForMaskedDiffusion) -> None:
    texts = []
    for _ in range(2):
        torch.manual_seed(7)
        texts.append(run(model, padded(prompts_of(), "left"), max_new_tokens=12, do_sample=True).sequences)
    assert torch.equal(*texts)


def test_generate_suppressed_tokens_never_generated(model: RelayForMaskedDiffusion) -> None:
    allowed = {3, 5, 8}
    suppressed = [token for token in range(VOCAB_SIZE) if token not in allowed]
    output = run(model, padded(prompts_of(), "left"), max_new_tokens=20, suppress_tokens=suppressed)
    assert set(output.sequences[:, -20:].flatten().tolist()) <= allowed


def test_generate_options_from_generation_config_object(model: RelayForMaskedDiffusion) -> None:
    prompt, options = prompt_of(5), {"max_new_tokens": 12, "unmasking_threshold": 0.9, "use_relay": False}
    by_object = model.generate(prompt, generation_config=GenerationConfig(**options))
    assert torch.equal(by_object, model.generate(prompt, **options))
    assert not torch.equal(by_object, model.generate(prompt, max_new_tokens=12, unmasking_threshold=0.0))


def test_generation_config_saved_options_come_back(model: RelayForMaskedDiffusion, tmp_path: Any) -> None:
    model.generation_config.update(unmasking_threshold=0.6, sub_block_size=None, use_relay=False)
    model.save_pretrained(tmp_path)
    loaded = RelayForMaskedDiffusion.from_pretrained(tmp_path)
    loaded.generate(prompt_of(5), max_new_tokens=3)
    config = loaded.generation_config
    assert (config.unmasking_threshold, config.sub_block_size, config.use_relay) == (0.6, None, False)


@pytest.mark.parametrize(
    ("block_size", "expected"),
    [
        (8, ("confidence_threshold", 0.85, 8)),
        (12, ("confidence_threshold", 0.85, None)),
        (None, ("confidence_budget", 0.15, None)),
    ],
)
def test_generation_config_defaults_follow_block_size(
    make_model: Callable, block_size: int | None, expected: tuple
) -> None:
    config = make_model(block_size=block_size).generation_config
    assert (config.unmasking_policy, config.unmasking_threshold, config.sub_block_size) == expected
    assert config.use_relay


# -- stopping --------------------------------------------------------------------------------------------------------


def test_generate_stop_token_of_prefill_forward_noticed(model: RelayForMaskedDiffusion) -> None:
    prompt = prompt_of(8)
    first = int(run(model, prompt, max_new_tokens=1).sequences[0, 8])
    output = run(model, prompt, max_new_tokens=20, eos_token_id=first)
    assert output.sequences[0, 8:].tolist() == [first]
    assert (output.denoise_forwards.tolist(), output.prefill_forwards.tolist()) == ([0], [1])


def test_generate_stop_token_of_commit_forward_noticed(model: RelayForMaskedDiffusion) -> None:
    texts = [
        (prompt, run(model, prompt[None], max_new_tokens=20).sequences[0, 5:].tolist())
        for prompt in prompts_of((5,) * 9)
    ]
    # The fourth new token is the first of the second block.
    prompt, text = next((prompt, text) for prompt, text in texts if text[3] not in text[:3])
    output = run(model, prompt[None], max_new_tokens=20, eos_token_id=text[3])
    assert output.sequences[0, 5:].tolist() == text[:4]
    assert output.commit_forwards.tolist() == [1]


def test_generate_stop_token_of_prompt_ignored(model: RelayForMaskedDiffusion) -> None:
    prompt = prompt_of(13)
    text = run(model, prompt, max_new_tokens=12).sequences
    unused = next(int(token) for token in prompt[0, 8:] if token not in text[0, 13:])
    assert torch.equal(run(model, prompt, max_new_tokens=12, eos_token_id=unused).sequences, text)


def test_generate_several_stop_tokens_first_one_ends(model: RelayForMaskedDiffusion) -> None:
    prompt = prompt_of(5)
    text = run(model, prompt, max_new_tokens=20).sequences[0, 5:].tolist()
    stops = [text[11], text[6]]
    end = min(text.index(stop) for stop in stops) + 1
    assert run(model, prompt, max_new_tokens=20, eos_token_id=stops).sequences[0, 5:].tolist() == text[:end]


def test_generate_text_before_stop_token_is_complete(model: RelayForMaskedDiffusion) -> None:
    """A stop token revealed early in the middle of a block must not leave holes before it."""
    inputs = padded(prompts_of(), "left")
    for eos in range(1, 40):
        assert not (run(model, inputs, max_new_tokens=16, eos_token_id=eos).sequences == MASK).any()


def test_generate_finished_rows_padded(model: RelayForMaskedDiffusion) -> None:
    prompts = prompts_of()
    text = run(model, padded(prompts, "left"), max_new_tokens=20).sequences[:, -20:].tolist()
    eos = next(token for token in text[0] if token not in text[1])
    output = run(model, padded(prompts, "left"), max_new_tokens=20, eos_token_id=eos, pad_token_id=41).sequences[
        :, -20:
    ]
    end = text[0].index(eos) + 1
    assert output[0].tolist() == text[0][:end] + [41] * (20 - end)
    assert output[1].tolist() == text[1]


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_generate_custom_stopping_criterion_sees_batch_token_by_token(
    model: RelayForMaskedDiffusion, side: str
) -> None:
    """As transformers shows it to criteria, so that those that know the batch from its beginning work."""
    inputs, limits = padded(prompts_of(), side), torch.tensor([5, 1, 20, 13, 9])
    prompts, seen = inputs["input_ids"], []

    text, step = run(model, inputs, max_new_tokens=20).sequences[:, prompts.shape[1] :], torch.arange(20)

    class Limits(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            new = input_ids[:, prompts.shape[1] :]
            count = new.shape[1]
            assert input_ids.equal(torch.cat([prompts, new], dim=1))
            # A row that has not come so far yet is not shown as one that has ended.
            is_due = step[:count] < limits[:, None]
            assert ((new == text[:, :count]) | (new == MASK))[is_due].all()
            seen.append(count)
            return count >= limits

    new = run(model, inputs, max_new_tokens=20, stopping_criteria=[Limits()]).sequences[:, prompts.shape[1] :]
    assert new.tolist() == text.where(step < limits[:, None], PAD).tolist()
    assert set(seen) == set(range(1, 21))


def test_generate_stopping_criterion_that_answers_for_all_rows_at_once(model: RelayForMaskedDiffusion) -> None:
    inputs = padded(prompts_of((5, 13)), "left")
    output = run(model, inputs, max_new_tokens=20, stopping_criteria=[lambda ids, scores: ids.shape[1] >= 13 + 5])
    text = run(model, inputs, max_new_tokens=20).sequences
    assert output.sequences.equal(text[:, : 13 + 5])


def test_generate_out_of_time_keeps_the_blocks_that_are_known(model: RelayForMaskedDiffusion) -> None:
    inputs = padded(prompts_of((5, 13)), "left")
    text = run(model, inputs, max_new_tokens=30).sequences[:, 13:]
    new = run(model, inputs, max_new_tokens=30, max_time=0.0).sequences[:, 13:]
    assert new.tolist() == [text[0, :3].tolist(), text[1, :3].tolist()]


# -- the cache -------------------------------------------------------------------------------------------------------


def test_generate_given_cache_is_used_and_returned(model: RelayForMaskedDiffusion) -> None:
    prompt, cache = prompt_of(13), RelayCache(config=model.config.text_config)
    output = run(model, prompt, max_new_tokens=12, cache=cache)
    assert output.cache is cache
    assert cache.get_seq_length() == 24
    assert torch.equal(output.sequences, run(model, prompt, max_new_tokens=12).sequences)


def test_generate_cache_of_short_earlier_run_leaves_no_state(model: RelayForMaskedDiffusion) -> None:
    """Such a run commits nothing, so its cache looks empty."""
    cache = RelayCache(config=model.config.text_config)
    run(model, prompts_of((3, 3), seed=1)[0][None], max_new_tokens=4, cache=cache)
    prompt = prompt_of(3)
    again = run(model, prompt, max_new_tokens=4, cache=cache, unmasking_threshold=1.0)
    assert torch.equal(again.sequences, run(model, prompt, max_new_tokens=4, unmasking_threshold=1.0).sequences)


def test_generate_cache_reset_between_runs_same_text(model: RelayForMaskedDiffusion) -> None:
    prompt, cache = prompt_of(13), RelayCache(config=model.config.text_config)
    first = run(model, prompt, max_new_tokens=12, cache=cache).sequences
    cache.reset()
    assert torch.equal(run(model, prompt, max_new_tokens=12, cache=cache).sequences, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generate_low_precision_batch_completes(make_model: Callable, tmp_path: Any, dtype: torch.dtype) -> None:
    """Rows are not compared: at this precision a batch may round otherwise than a row alone."""
    make_model(open_channel=True, token_shift=True).save_pretrained(tmp_path)
    model = RelayForMaskedDiffusion.from_pretrained(tmp_path, dtype=dtype)
    output = run(model, padded(prompts_of(), "mixed"), max_new_tokens=12)
    assert output.sequences.shape == (len(LENGTHS), max(LENGTHS) + 2 + 12)
    assert not (output.sequences == MASK).any()
