"""Drawn tokens: repeatable by their seeds, and distributed as the model and the options say."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from relay_hf import RelayForMaskedDiffusion
from relay_hf.modeling.generation_tokens_relay import TokenChooser, uniform_numbers

from ..conftest import MASK, VOCAB_SIZE
from .decoding import padded, prompt_of, prompts_of, run

DRAWS = 4000


@pytest.fixture
def model(make_model: Callable) -> RelayForMaskedDiffusion:
    return make_model(open_channel=True, token_shift=True)


# -- seeds -----------------------------------------------------------------------------------------------------------


def test_sampling_seeds_repeat_whatever_the_global_generator_says(model: RelayForMaskedDiffusion) -> None:
    inputs, texts = padded(prompts_of(), "left"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        texts.append(run(model, inputs, max_new_tokens=12, do_sample=True, sampling_seeds=[3, 1, 4, 1, 5]).sequences)
    assert torch.equal(*texts)


def test_sampling_seeds_belong_to_their_row(model: RelayForMaskedDiffusion) -> None:
    prompts, options = prompt_of(5).expand(3, -1), {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0}
    first = run(model, prompts, sampling_seeds=[7, 8, 7], **options).sequences
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(run(model, prompts, sampling_seeds=[8, 7, 9], **options).sequences[:2], first[[1, 0]])


def test_sampling_seeds_that_differ_in_any_bit_differ(model: RelayForMaskedDiffusion) -> None:
    seeds = [0, -1, *(2**bit for bit in range(63)), -(2**63)]
    prompts = prompt_of(5).expand(len(seeds), -1)
    output = run(model, prompts, max_new_tokens=16, do_sample=True, temperature=5.0, sampling_seeds=seeds)
    assert len({tuple(row) for row in output.sequences.tolist()}) == len(seeds)


def test_sampling_positions_of_one_row_draw_independently(make_model: Callable) -> None:
    """With one distribution for every position, equal numbers would give equal tokens."""
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    options = {"max_new_tokens": 64, "do_sample": True, "sampling_seeds": [0], "unmasking_threshold": 0.0}
    new = run(model, prompt_of(8), **options).sequences[0, 8:]
    assert len(set(new.tolist())) > 30  # of 63, on average 40


def test_greedy_leaves_global_generator_alone(model: RelayForMaskedDiffusion) -> None:
    before = torch.get_rng_state()
    run(model, padded(prompts_of(), "left"), max_new_tokens=12)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_without_seeds_moves_on(model: RelayForMaskedDiffusion) -> None:
    torch.manual_seed(0)
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0}
    first, second = (run(model, prompt_of(5), **options).sequences for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(run(model, prompt_of(5), **options).sequences, first)
    assert not torch.equal(first, second)


# -- distributions ---------------------------------------------------------------------------------------------------


def only_position(model: RelayForMaskedDiffusion, prompt: Tensor) -> Tensor:
    """(V,) logits of the first position behind the prompt, in a block that is masked from there."""
    ids = torch.cat([prompt, torch.full((8 - len(prompt),), MASK)])[None]
    with torch.no_grad():
        return model(ids, relay_state=model.initial_relay_state(*ids.shape)).logits[0, len(prompt)]


def counts_of(model: RelayForMaskedDiffusion, prompt: Tensor, first_seed: int = 0, **options: Any) -> Tensor:
    """(V,) how often each token comes up as the one new token."""
    seeds = list(range(first_seed, first_seed + DRAWS))
    options = {"max_new_tokens": 1, "sub_block_size": 1, "num_return_sequences": DRAWS, **options}
    output = run(model, prompt[None], do_sample=True, sampling_seeds=seeds, **options)
    assert output.denoise_forwards.tolist() == [1] * DRAWS
    return output.sequences[:, -1].bincount(minlength=VOCAB_SIZE)


def assert_drawn_from(counts: Tensor, probabilities: Tensor) -> None:
    """A chi-square test at four standard deviations; rare tokens are counted together, impossible ones never come."""
    assert counts[probabilities == 0].sum() == 0
    expected, is_rare = DRAWS * probabilities, DRAWS * probabilities < 5
    counts, expected = (torch.cat([t[~is_rare], t[is_rare].sum()[None]]).double() for t in (counts, expected))
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1)).sum()
    freedom = len(counts) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4


def nucleus(p: Tensor, mass: float) -> Tensor:
    ascending, order = p.sort(descending=True)
    return torch.zeros_like(p, dtype=torch.bool).scatter(0, order, ascending.cumsum(0) - ascending < mass)


def typical(p: Tensor, mass: float) -> Tensor:
    """Tokens whose information is nearest to the entropy, up to the given mass."""
    information = -p.log()
    order = (information - torch.special.entr(p).sum()).abs().argsort()
    before = p[order].cumsum(0) - p[order]
    return torch.zeros_like(p, dtype=torch.bool).scatter(0, order, before < mass)


WARPERS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "none": ({}, lambda p: p >= 0),
    "hot": ({"temperature": 2.5}, lambda p: p >= 0),
    "cold": ({"temperature": 0.4}, lambda p: p >= 0),
    "top_k": ({"top_k": 4}, lambda p: p >= p.topk(4).values[-1]),
    "top_p": ({"top_p": 0.6}, lambda p: nucleus(p, 0.6)),
    "hot top_p": ({"temperature": 2.5, "top_p": 0.6}, lambda p: nucleus(p, 0.6)),
    "min_p": ({"min_p": 0.2}, lambda p: p >= 0.2 * p.max()),
    "typical_p": ({"typical_p": 0.5}, lambda p: typical(p, 0.5)),
    "epsilon": ({"epsilon_cutoff": 0.02}, lambda p: p >= 0.02),
    "eta": ({"eta_cutoff": 0.02}, lambda p: p >= min(0.02, 0.02**0.5 * float((-torch.special.entr(p).sum()).exp()))),
}


@pytest.mark.parametrize("name", WARPERS)
def test_sampling_one_token_has_the_distribution_asked_for(make_model: Callable, name: str) -> None:
    model, prompt = make_model(token_shift=False, text={"initializer_range": 0.25}), prompts_of((3,))[0]
    options, kept = WARPERS[name]
    logits = only_position(model, prompt).index_fill(0, torch.tensor(MASK), -1e9) / options.get("temperature", 1.0)
    p = logits.softmax(0) * kept(logits.softmax(0))
    assert 2 < (p > 0).sum() < VOCAB_SIZE - 1 or name in ("none", "hot", "cold")
    assert_drawn_from(counts_of(model, prompt, **{"top_k": 0, **options}), p / p.sum())


def test_sampling_of_position_scored_by_prefill_has_its_distribution(make_model: Callable) -> None:
    """The first token of a token-shift model's block does not come from a denoise forward."""
    model, prompt = make_model(token_shift=True, text={"initializer_range": 0.25}), prompt_of(8)
    options = {"max_new_tokens": 1, "num_return_sequences": DRAWS, "sampling_seeds": list(range(DRAWS)), "top_k": 0}
    output = run(model, prompt, do_sample=True, **options)
    assert not output.denoise_forwards.any()
    logits = model(torch.cat([prompt, prompt], dim=1)).logits[0, 8]  # what follows does not matter to it
    p = logits.detach().index_fill(0, torch.tensor(MASK), -1e9).softmax(0)
    assert_drawn_from(output.sequences[:, -1].bincount(minlength=VOCAB_SIZE), p)


def test_sampling_rows_of_a_batch_have_the_distribution_too(make_model: Callable) -> None:
    """Seeds far apart and of both signs, given to rows instead of copies."""
    model, prompt = make_model(token_shift=False, text={"initializer_range": 0.25}), prompts_of((3,))[0]
    seeds = [(row - DRAWS // 2) * 2**40 for row in range(DRAWS)]
    options = {"max_new_tokens": 1, "sub_block_size": 1, "top_k": 0, "do_sample": True, "sampling_seeds": seeds}
    output = run(model, prompt.expand(DRAWS, -1), **options)
    p = only_position(model, prompt).index_fill(0, torch.tensor(MASK), -1e9).softmax(0)
    assert_drawn_from(output.sequences[:, -1].bincount(minlength=VOCAB_SIZE), p)


@pytest.mark.parametrize("first", [0, 5])
def test_chooser_extreme_numbers_never_choose_the_impossible(first: int) -> None:
    """The smallest number and the largest, with impossible tokens at both ends."""
    chooser = TokenChooser(LogitsProcessorList(), do_sample=True, mask_token_id=9, measures="confidence")
    logits = torch.full((2, 10), -torch.inf)
    logits[:, first : first + 3] = 0.0
    numbers = torch.tensor([0.0, 1 - 2.0**-48], dtype=torch.float64)
    choice = chooser(logits, torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 1), numbers)
    assert choice.tokens.tolist() == [first, first + 2]
    assert choice.confidence.tolist() == pytest.approx([1 / 3, 1 / 3])


# -- the numbers -----------------------------------------------------------------------------------------------------

KEYS = {
    "seeds": lambda n: (torch.arange(n), torch.tensor(1), torch.tensor(5)),
    "steps": lambda n: (torch.tensor(7), torch.arange(n), torch.tensor(5)),
    "positions": lambda n: (torch.tensor(7), torch.tensor(1), torch.arange(n)),
    "diagonal": lambda n: (torch.arange(n), torch.arange(n), torch.arange(n)),
    "negative": lambda n: (torch.arange(-n, 0) * 2**32, torch.tensor(0), torch.tensor(0)),
}


@pytest.mark.parametrize("name", KEYS)
def test_uniform_numbers_uniform_and_uncorrelated(name: str) -> None:
    n = 20_000
    numbers = uniform_numbers(*KEYS[name](n))
    assert numbers.dtype == torch.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # Kolmogorov-Smirnov, at the bound that one sample in a hundred exceeds.
    ranks = torch.arange(n, dtype=torch.float64) / n
    assert (numbers.sort().values - ranks).abs().max() < 1.63 / n**0.5
    for lag in (1, 2, 8):
        correlation = torch.corrcoef(torch.stack([numbers[lag:], numbers[:-lag]]))[0, 1]
        assert correlation.abs() < 4 / n**0.5
    pairs = ((numbers[:-1] * 10).long() * 10 + (numbers[1:] * 10).long()).bincount(minlength=100)
    assert ((pairs - n / 100) ** 2 / (n / 100)).sum() < 99 + 4 * 198**0.5
    assert len(numbers.unique()) == n


def test_uniform_numbers_any_broadcasting_same_numbers() -> None:
    seeds, steps, positions = torch.arange(3) - 1, torch.arange(4), torch.arange(5)
    table = uniform_numbers(seeds[:, None, None], steps[:, None], positions)
    assert table.shape == (3, 4, 5)
    for i, seed in enumerate(seeds):
        for j, step in enumerate(steps):
            assert torch.equal(uniform_numbers(seed.expand(5), step, positions), table[i, j])
            assert uniform_numbers(seed, step, positions[2]) == table[i, j, 2]


def test_uniform_numbers_order_of_keys_matters() -> None:
    one, two = torch.tensor(1), torch.tensor(2)
    assert len({float(uniform_numbers(*keys)) for keys in ((one, two), (two, one), (one,), (one, two, one * 0))}) == 4


# -- the temperature schedule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"top_p": 0.7}, {"top_k": 5}, {"bad_words_ids": [[4]]}])
def test_flat_schedule_equals_temperature(model: RelayForMaskedDiffusion, extra: dict[str, Any]) -> None:
    inputs = padded(prompts_of(), "left")
    options = {"max_new_tokens": 20, "do_sample": True, "sampling_seeds": [5, 4, 3, 2, 1], **extra}
    fixed, flat = (run(model, inputs, **options, **how) for how in ({"temperature": 0.5}, {"t_max": 0.5, "t_min": 0.5}))
    assert torch.equal(fixed.sequences, flat.sequences)
    assert torch.equal(fixed.denoise_forwards, flat.denoise_forwards)


class Spy(LogitsProcessor):
    """Notes the schedule and how wide the scores of the step spread."""

    def __init__(self) -> None:
        self.shares: list[Tensor] = []
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, cur_step: Tensor) -> Tensor:
        self.shares.append(cur_step.flatten())
        self.scores.append(scores.clone())
        return scores


def test_schedule_falls_from_one_with_every_step_of_a_block(make_model: Callable) -> None:
    spy = Spy()
    options = {"max_new_tokens": 16, "do_sample": True, "unmasking_threshold": 1.0, "sub_block_size": None}
    run(make_model(token_shift=False), prompt_of(4), logits_processor=[spy], t_max=2.0, t_min=0.5, **options)
    # The prompt ends in the middle of a block; the last one is known as soon as its needed half is.
    shares = [float(share[0]) for share in spy.shares]
    assert all(share.min() == share.max() for share in spy.shares)
    assert shares[:12] == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4, *(left / 8 for left in range(8, 0, -1))])
    assert shares[12] == 1.0
    assert all(0 < later < earlier for earlier, later in itertools.pairwise(shares[12:]))


def test_schedule_temperature_falls_with_the_share_that_is_left(make_model: Callable) -> None:
    """By the probability that each drawn token is said to have; custom processors see what is not tempered yet."""
    model, prompt = make_model(token_shift=False), prompts_of((3,))[0]
    options = {"max_new_tokens": 5, "do_sample": True, "unmasking_threshold": 0.0, "sampling_seeds": [1], "top_k": 0}
    spy = Spy()
    output = run(model, prompt[None], logits_processor=[spy], sub_block_size=1, t_max=4.0, t_min=0.5,
                 output_history=True, **options)  # fmt: skip
    # Five positions: the temperature falls by a fifth of its range with each.
    shares = [1.0, 0.8, 0.6, 0.4, 0.2]
    assert [float(share[0]) for share in spy.shares] == pytest.approx(shares)
    expected = [
        (scores[0] / (0.5 + 3.5 * share)).softmax(-1)[token]
        for share, scores, token in zip(shares, spy.scores, output.sequences[0, 3:].tolist(), strict=True)
    ]
    torch.testing.assert_close(output.history.confidence[0, 3:], torch.stack(expected))


# -- processors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [5.0, 0.2])
def test_repetition_penalty_of_one_token_is_that_of_tokens_in_the_prompt(make_model: Callable, penalty: float) -> None:
    model, changed = make_model(token_shift=False), 0
    for prompt in prompts_of((7,) * 40):
        logits = only_position(model, prompt).index_fill(0, torch.tensor(MASK), -1e9)
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
        expected = torch.where(torch.isin(torch.arange(VOCAB_SIZE), prompt), penalised, logits).argmax()
        output = run(model, prompt[None], max_new_tokens=1, repetition_penalty=penalty)
        assert output.sequences[0, -1] == expected
        changed += int(expected != logits.argmax())
    assert changed > 2


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("token_shift", [False, True])
def test_banned_tokens_never_generated_in_any_block(make_model: Callable, token_shift: bool, do_sample: bool) -> None:
    model, inputs = make_model(token_shift=token_shift, open_channel=True), padded(prompts_of(), "mixed")
    options = {"max_new_tokens": 40, "do_sample": do_sample}
    torch.manual_seed(0)
    usual = run(model, inputs, **options).sequences[:, -40:].flatten().bincount(minlength=VOCAB_SIZE)
    first, second, third = usual.topk(3).indices.tolist()
    bans = {"bad_words_ids": [[first]], "suppress_tokens": [second], "sequence_bias": [[[third], -1e9]]}
    new = run(model, inputs, **options, **bans).sequences[:, -40:]
    assert not torch.isin(new, torch.tensor([first, second, third])).any()


def test_sequence_bias_decides_every_token(model: RelayForMaskedDiffusion) -> None:
    output = run(model, padded(prompts_of(), "mixed"), max_new_tokens=20, sequence_bias=[[[11], 1e4]])
    assert (output.sequences[:, -20:] == 11).all()
