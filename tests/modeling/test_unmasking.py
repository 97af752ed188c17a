"""Unmasking policies: what holds for every input, against plain loops where there is one right answer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from relay_hf.modeling import ConfidenceBudget, ConfidenceThreshold, UnmaskingPolicy, make_policy
from relay_hf.modeling.generation_tokens_relay import margins
from relay_hf.modeling.head_relay import best_token
from relay_hf.modeling.unmasking_relay import (
    POLICIES,
    EntropyBound,
    FixedCount,
    Progress,
    in_earliest_sub_block,
    sub_blocks_of,
)

# Sixty-fourths are exact in float32, so that ties and sums that just reach the threshold occur and have one answer.
UNIT = 64
THRESHOLDS = st.integers(0, UNIT).map(lambda n: n / UNIT)


@st.composite
def groups(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(G, L) confidence and (G, L) bool."""
    count, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    numbers = st.lists(st.integers(0, UNIT), min_size=length, max_size=length)
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    confidence = torch.tensor([draw(numbers) for _ in range(count)]) / UNIT
    return confidence, torch.tensor([draw(flags) for _ in range(count)])


def naive_threshold(confidence: list[float], masked: list[bool], threshold: float) -> set[int]:
    candidates = [i for i, is_masked in enumerate(masked) if is_masked]
    sure = {i for i in candidates if confidence[i] > threshold}
    return sure | ({max(candidates, key=lambda i: confidence[i])} if candidates else set())


def naive_budget(confidence: list[float], masked: list[bool], threshold: float) -> set[int]:
    candidates = sorted((i for i, is_masked in enumerate(masked) if is_masked), key=lambda i: 1 - confidence[i])
    revealed, spent = set(), 0.0
    for i in candidates:
        spent += 1 - confidence[i]
        if spent >= threshold:
            break
        revealed.add(i)
    return revealed or set(candidates[:1])


def naive_count(confidence: list[float], masked: list[bool], threshold: float) -> set[int]:
    candidates = sorted((i for i, is_masked in enumerate(masked) if is_masked), key=lambda i: -confidence[i])
    return set(candidates[: int(threshold)])


def naive_entropy(entropy: list[float], masked: list[bool], threshold: float) -> set[int]:
    revealed, spent = set(), 0.0
    for i in sorted((i for i, is_masked in enumerate(masked) if is_masked), key=lambda i: entropy[i]):
        if spent > threshold:
            break
        revealed.add(i)
        spent += entropy[i]
    return revealed


NAIVE = {
    "confidence_threshold": naive_threshold,
    "confidence_budget": naive_budget,
    "fixed_count": naive_count,
    "entropy_bound": naive_entropy,
}


def policy_at(name: str, threshold: float) -> UnmaskingPolicy:
    """`threshold` in [0, 1] is moved into the range of the policy."""
    return make_policy(name, 1 + round(8 * threshold) if name == "fixed_count" else threshold)


def test_every_policy_has_a_naive_version() -> None:
    ours = {name for name, policy in POLICIES.items() if policy.__module__.startswith("relay_hf.")}
    assert NAIVE.keys() | {"time_schedule"} == ours


@pytest.mark.parametrize("name", NAIVE)
@given(groups(), THRESHOLDS)
def test_policy_any_input_equals_naive_loop(name: str, group: tuple[Tensor, Tensor], threshold: float) -> None:
    confidence, masked = group
    policy = policy_at(name, threshold)
    revealed = policy(confidence, masked)
    for row in range(len(confidence)):
        expected = NAIVE[name](confidence[row].tolist(), masked[row].tolist(), policy.threshold)
        assert set(revealed[row].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("name", NAIVE)
@given(groups(), THRESHOLDS)
def test_policy_any_input_reveals_masked_positions_only_and_at_least_one(
    name: str, group: tuple[Tensor, Tensor], threshold: float
) -> None:
    confidence, masked = group
    revealed = policy_at(name, threshold)(confidence, masked)
    assert not (revealed & ~masked).any()
    assert revealed.any(-1).equal(masked.any(-1))


@pytest.mark.parametrize("name", NAIVE)
@given(groups(), THRESHOLDS, THRESHOLDS)
def test_policy_threshold_monotone(name: str, group: tuple[Tensor, Tensor], one: float, other: float) -> None:
    """A stricter threshold reveals a subset; strict is high for probabilities, low for all that is spent."""
    strict, lax = (max(one, other), min(one, other)) if name == "confidence_threshold" else sorted((one, other))
    assert not (policy_at(name, strict)(*group) & ~policy_at(name, lax)(*group)).any()


@pytest.mark.parametrize("name", NAIVE)
@given(groups(), THRESHOLDS)
def test_policy_arguments_untouched(name: str, group: tuple[Tensor, Tensor], threshold: float) -> None:
    before = [tensor.clone() for tensor in group]
    policy_at(name, threshold)(*group)
    assert all(torch.equal(new, old) for new, old in zip(group, before, strict=True))


@pytest.mark.parametrize("policy", [ConfidenceThreshold(1.0), ConfidenceBudget(0.0), FixedCount(1), EntropyBound(0.0)])
def test_policy_strictest_threshold_reveals_one_at_a_time(policy: UnmaskingPolicy) -> None:
    confidence, masked = torch.ones(3, 5), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    assert policy(confidence, masked).sum(-1).tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    "policy", [ConfidenceThreshold(0.0), ConfidenceBudget(torch.inf), FixedCount(4), EntropyBound(torch.inf)]
)
def test_policy_laxest_threshold_reveals_all(policy: UnmaskingPolicy) -> None:
    confidence, masked = torch.full((2, 4), 0.01), torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0]]).bool()
    assert policy(confidence, masked).equal(masked)


def test_policy_low_precision_confidence_accepted() -> None:
    confidence, masked = torch.tensor([[0.5, 0.9, 0.95]], dtype=torch.bfloat16), torch.ones(1, 3, dtype=torch.bool)
    assert ConfidenceBudget(0.2)(confidence, masked).tolist() == [[False, True, True]]
    assert ConfidenceThreshold(0.8)(confidence, masked).tolist() == [[False, True, True]]


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_confidence_threshold_outside_unit_interval_raises(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"`unmasking_threshold=.*` is not a probability.*\[0, 1\]"):
        make_policy("confidence_threshold", threshold)


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_confidence_budget_negative_raises(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"`unmasking_threshold=.*` is negative.*>= 0"):
        make_policy("confidence_budget", threshold)


@pytest.mark.parametrize("threshold", [0, 0.5, 2.5, -1, float("nan"), float("inf")])
def test_fixed_count_that_is_no_whole_number_raises(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"`unmasking_threshold=.*` is not a number of positions.*whole number >= 1"):
        make_policy("fixed_count", threshold)


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_entropy_bound_negative_raises(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"`unmasking_threshold=.*` is negative: `entropy_bound` needs nats"):
        make_policy("entropy_bound", threshold)


def test_make_policy_unknown_name_raises() -> None:
    with pytest.raises(ValueError, match=r"`unmasking_policy='greedy'` is unknown.*'confidence_budget'"):
        make_policy("greedy", 0.5)


@given(st.integers(0, 2**16), st.integers(0, 6))
def test_best_token_any_logits_most_probable_that_is_not_mask(seed: int, mask: int) -> None:
    scores = 5 * torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))
    scores[0, mask] = 50.0  # preferred by far
    probability, token = best_token(scores.clone(), mask)
    assert not (token == mask).any()
    # By the logits, because probabilities of nearly equal ones may round to the same number.
    assert token.equal(scores.index_fill(-1, torch.tensor([mask]), -1e9).argmax(-1))
    # Two ways to normalise: the difference of two numbers around 20 is exact to 1e-6.
    expected = scores.softmax(-1).gather(-1, token[:, None])[:, 0]
    torch.testing.assert_close(probability, expected, atol=1e-5, rtol=0)
    assert (probability <= 1).all()


def test_best_token_low_precision_logits_probability_in_float32() -> None:
    probability, _ = best_token(torch.zeros(1, 1001, dtype=torch.bfloat16), 0)
    assert probability.dtype == torch.float32
    assert probability.item() == pytest.approx(1 / 1001, rel=1e-5)


@pytest.mark.parametrize("threshold", [None, "0.9", True])
def test_make_policy_threshold_that_is_no_number_raises(threshold: object) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        make_policy("confidence_threshold", threshold)


# -- a number of steps -------------------------------------------------------------------------------------------------

ORDERED = {
    "confidence": lambda measure, place: -measure,
    "margin": lambda measure, place: -measure,
    "entropy": lambda measure, place: measure,
    "left_to_right": lambda measure, place: place,
}


def take(order: str, measure: list[float], masked: list[bool], count: int) -> set[int]:
    hidden = [i for i, is_masked in enumerate(masked) if is_masked]
    return set(sorted(hidden, key=lambda i: ORDERED[order](measure[i], i))[:count])


def share_of_step(step: int, steps: int, positions: int) -> int:
    """LLaDA's and SDAR's: the first ones take one more."""
    return [positions // steps + (s < positions % steps) for s in range(steps)][step]


def share_of_time(step: int, steps: int, hidden: int) -> int:
    """Dream's."""
    time = [float(t) for t in torch.linspace(1.0, 1e-3, steps + 1)]
    return int(hidden * (1 - time[step + 1] / time[step])) if step < steps - 1 else hidden


@st.composite
def in_progress(draw: st.DrawFn) -> tuple[Tensor, Tensor, Progress, int]:
    """(G, L) measure, (G, L) bool, how far each group is, and of how many steps."""
    measure, masked = draw(groups())
    steps = draw(st.integers(1, 12))
    numbers = st.lists(st.integers(0, steps - 1), min_size=len(measure), max_size=len(measure))
    positions = st.lists(st.integers(1, 20), min_size=len(measure), max_size=len(measure))
    return measure, masked, Progress(torch.tensor(draw(numbers)), torch.tensor(draw(positions))), steps


def revealed_of(row: Tensor) -> set[int]:
    return set(row.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("order", ORDERED)
@given(in_progress())
def test_fixed_count_with_steps_spreads_positions(order: str, case: tuple) -> None:
    measure, masked, progress, steps = case
    revealed = make_policy("fixed_count", 0.85, steps, order)(measure, masked, progress)
    for row, (step, positions) in enumerate(zip(progress.step.tolist(), progress.positions.tolist(), strict=True)):
        count = max(share_of_step(step, steps, positions), 1)
        assert revealed_of(revealed[row]) == take(order, measure[row].tolist(), masked[row].tolist(), count)


@pytest.mark.parametrize("order", ORDERED)
@given(in_progress())
def test_time_schedule_reveals_share_of_the_time_left(order: str, case: tuple) -> None:
    measure, masked, progress, steps = case
    revealed = make_policy("time_schedule", 0.85, steps, order)(measure, masked, progress)
    for row, step in enumerate(progress.step.tolist()):
        count = share_of_time(step, steps, int(masked[row].sum()))
        assert revealed_of(revealed[row]) == take(order, measure[row].tolist(), masked[row].tolist(), count)


def test_time_schedule_as_dream() -> None:
    """16 positions in 8 steps, from the family's own sampler."""
    policy, masked, counts = make_policy("time_schedule", 0.0, 8), torch.ones(1, 16, dtype=torch.bool), []
    for step in range(8):
        revealed = policy(torch.rand(1, 16), masked, Progress(torch.tensor([step]), torch.tensor([16])))
        counts.append(int(revealed.sum()))
        masked &= ~revealed
    assert counts == [1, 2, 2, 2, 2, 2, 2, 3]


@given(in_progress(), THRESHOLDS)
def test_confidence_threshold_with_steps_reveals_at_least_their_share(case: tuple, threshold: float) -> None:
    measure, masked, progress, steps = case
    revealed = make_policy("confidence_threshold", threshold, steps)(measure, masked, progress)
    for row, (step, positions) in enumerate(zip(progress.step.tolist(), progress.positions.tolist(), strict=True)):
        count = max(share_of_step(step, steps, positions), 1)
        least = take("confidence", measure[row].tolist(), masked[row].tolist(), count)
        sure = {i for i in revealed_of(masked[row]) if measure[row, i] > threshold}
        assert revealed_of(revealed[row]) == least | sure


@given(groups(), THRESHOLDS, st.integers(1, 4))
def test_confidence_threshold_with_count_also_reveals_the_surest(
    group: tuple[Tensor, Tensor], threshold: float, count: int
) -> None:
    confidence, masked = group
    revealed = make_policy("confidence_threshold", threshold, unmasking_count=count)(confidence, masked)
    for row in range(len(confidence)):
        least = naive_count(confidence[row].tolist(), masked[row].tolist(), count)
        sure = naive_threshold(confidence[row].tolist(), masked[row].tolist(), threshold)
        assert revealed_of(revealed[row]) == least | sure


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("time_schedule", 0.5), "`unmasking_policy='time_schedule'` spreads .*: also set `denoising_steps`"),
        (("entropy_bound", 0.5, 4), r"`denoising_steps=4` has no effect with .*'entropy_bound'.*'time_schedule'"),
        (("confidence_threshold", 0.5, 4, "margin"), "`unmasking_order='margin'` has no effect with"),
        (("fixed_count", 1, 4, "best"), r"`unmasking_order='best'` is unknown.*'left_to_right'"),
        (("fixed_count", 1, 0), "`denoising_steps=0` is not a whole number >= 1"),
        (("fixed_count", 1, True), "`denoising_steps=True` is not a whole number >= 1"),
        (("confidence_threshold", 0.5, None, "confidence", 0), "`unmasking_count=0` is not a whole number >= 1"),
        (("fixed_count", 1, None, "confidence", 2), "`unmasking_count=2` has no effect with .*'confidence_threshold'"),
        (("confidence_threshold", 0.5, 4, "confidence", 2), "both say how many positions a step reveals"),
    ],
)
def test_make_policy_senseless_schedule_raises(options: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(*options)


def test_policy_with_steps_without_progress_raises() -> None:
    with pytest.raises(ValueError, match="has to be given the `progress`"):
        make_policy("fixed_count", 1, 4)(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool))


# -- sub-blocks --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 5), st.lists(st.integers(-3, 12), min_size=1, max_size=3))
def test_sub_blocks_counted_from_anchor(count: int, size: int, anchors: list[int]) -> None:
    numbers = sub_blocks_of(count, size, torch.tensor(anchors))
    assert numbers.tolist() == [[(place - anchor) // size for place in range(count)] for anchor in anchors]


def test_in_earliest_sub_block_each_row_by_its_own_anchor() -> None:
    masked = torch.tensor([[False, True, True, True, True]]).expand(2, -1)
    here = in_earliest_sub_block(masked, sub_blocks_of(5, 2, torch.tensor([0, 1])))
    assert here.tolist() == [[True, True, False, False, False], [False, True, True, False, False]]


# -- margins -----------------------------------------------------------------------------------------------------------


def test_margin_best_token_minus_any_other() -> None:
    scores = torch.tensor([[0.5, 0.2, 0.3], [0.2, 0.7, 0.1], [0.1, 0.4, 0.5]]).log()
    assert margins(scores, mask_token_id=2).tolist() == pytest.approx([0.2, 0.5, -0.1])
