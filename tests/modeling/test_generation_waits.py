"""What decoding costs beside the network: one wait for the device a step, and a head for positions it can reveal."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from relay_hf import RelayForMaskedDiffusion, RelayGenerateOutput

from ..conftest import MASK, VOCAB_SIZE
from .decoding import padded, prompt_of, prompts_of, run

ATEN = torch.ops.aten
# What has to know numbers on the device before it can go on.
WAITING = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.repeat_interleave,
           ATEN._unique2, ATEN.unique_dim, ATEN.unique_consecutive}  # fmt: skip
INDEXING = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._unsafe_index}


class Waits(TorchDispatchMode):
    """Counts operations that would make the host wait for an accelerator; `waits.lists` are calls of `tolist`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.lists = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        packet = func.overloadpacket
        is_mask = packet in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += packet in WAITING or is_mask
        return func(*args, **(kwargs or {}))


@contextmanager
def counting_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    waits, tolist = Waits(), Tensor.tolist

    def counted(self: Tensor) -> Any:
        waits.lists += 1
        return tolist(self)

    with waits, monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", counted)
        yield waits


@contextmanager
def counting_drafts(model: RelayForMaskedDiffusion) -> Iterator[list[int]]:
    """Rows of every forward that scores something, whether it also commits or not."""
    rows: list[int] = []

    def note(module: Any, arguments: tuple, kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs["logits_to_keep"], tuple) and len(kwargs["logits_to_keep"][0]):
            rows.append(len(arguments[0]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    yield rows
    handle.remove()


def run_counted(
    model: RelayForMaskedDiffusion, monkeypatch: pytest.MonkeyPatch, inputs: Any, **options: Any
) -> tuple[RelayGenerateOutput, list[int], Waits]:
    """What `run` returns, from a fixed seed; rows of every forward that scores something; and the waits."""
    torch.manual_seed(0)
    with counting_drafts(model) as drafts, counting_waits(monkeypatch) as waits:
        output = run(model, inputs, **options)
    return output, drafts, waits


COUNTS = {"unmasking_policy": "fixed_count"}
CASES: dict[str, tuple[bool, dict[str, Any], tuple[float, float]]] = {
    # Whether the batch is padded, options, and the thresholds of many and few steps.
    "plain": (False, {}, (1.0, 0.0)),
    "padded": (True, {}, (1.0, 0.0)),
    "small sub-blocks": (True, {"sub_block_size": 2}, (1.0, 0.0)),
    "sub-block cache": (False, {"sub_block_size": 4, "use_sub_block_cache": True}, (1.0, 0.0)),
    "fused commits": (False, {"fuse_commits": True}, (1.0, 0.0)),
    # The mask of the steps behind the fused one is prepared once a block, so that both runs have to get there.
    "fused commits, padded": (True, {"fuse_commits": True, **COUNTS, "sub_block_size": 8}, (1, 4)),
    "both": (False, {"fuse_commits": True, "sub_block_size": 4, "use_sub_block_cache": True}, (1.0, 0.0)),
    "without relay": (True, {"use_relay": False}, (1.0, 0.0)),
    "sampling": (True, {"do_sample": True, "top_p": 0.9, "top_k": 20, "temperature": 0.7}, (1.0, 0.0)),
    "schedule": (True, {"do_sample": True, "t_max": 2.0, "t_min": 0.5}, (1.0, 0.0)),
    "budget": (True, {"unmasking_policy": "confidence_budget"}, (0.0, 1e9)),
    "fixed count": (True, COUNTS, (1, 8)),
    "entropy": (True, {"unmasking_policy": "entropy_bound"}, (0.0, 1e9)),
    "banned tokens": (True, {"bad_words_ids": [[3], [9]], "suppress_tokens": [4]}, (1.0, 0.0)),
    "repetition penalty": (False, {"repetition_penalty": 1.3}, (1.0, 0.0)),
    "self start": (True, {"relay_start": "self"}, (1.0, 0.0)),
    "self start, fused commits": (False, {"relay_start": "self", "fuse_commits": True}, (1.0, 0.0)),
    "history": (True, {"output_history": True}, (1.0, 0.0)),
}


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_generate_every_step_waits_once(
    make_model: Callable, monkeypatch: pytest.MonkeyPatch, name: str, token_shift: bool
) -> None:
    """Whatever else waits does so once a block or once a call, so that it is the same for many steps and for few."""
    is_padded, options, thresholds = CASES[name]
    model, prompts = make_model(open_channel=True, token_shift=token_shift), prompts_of()
    # Stop tokens are looked for in every step; these never come up.
    stops = {"eos_token_id": [1, 2, 3], "sequence_bias": [[[stop], -1e9] for stop in (1, 2, 3)]}
    inputs = padded(prompts, "mixed") if is_padded else prompt_of(11)
    waits, lists, steps, commits = [], [], [], []
    for threshold in thresholds:
        limits = {"max_new_tokens": 30, "unmasking_threshold": threshold}
        output, drafts, counted = run_counted(model, monkeypatch, inputs, **options, **stops, **limits)
        waits.append(counted.count)
        lists.append(counted.lists)
        steps.append(len(drafts))
        commits.append(output.commit_forwards.tolist())
    assert commits[0] == commits[1]
    assert steps[0] > steps[1] + 8
    assert lists[0] - lists[1] == steps[0] - steps[1]
    assert waits[0] == waits[1]


def waits_beside_steps(
    model: RelayForMaskedDiffusion, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[tuple[int, int]]:
    """What waits in texts of three blocks and of seven: lists beside one for each step, and other waits."""
    waits = []
    for new_tokens in (16, 48):
        rows = prompt_of(11).expand(2, -1)
        _, drafts, counted = run_counted(model, monkeypatch, rows, max_new_tokens=new_tokens, **options)
        waits.append((counted.lists - len(drafts), counted.count))
    return waits


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_generate_blocks_wait_for_nothing_beside_their_steps(
    make_model: Callable, monkeypatch: pytest.MonkeyPatch, name: str, token_shift: bool
) -> None:
    _, options, thresholds = CASES[name]
    model = make_model(open_channel=True, token_shift=token_shift)
    few, many = waits_beside_steps(model, monkeypatch, **options, unmasking_threshold=thresholds[0])
    assert few == many
    assert few[0] == 2  # at the start, about tokens and lengths of the prompts


@pytest.mark.parametrize("options", [{}, {"relay_start": "self"}, {"relay_start": "reference"}, {"sub_block_size": 4,
    "use_sub_block_cache": "prefix"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("channel", ["residual_context", "soft_mask"])
def test_generate_channel_that_reads_distributions_waits_for_nothing(
    make_model: Callable, monkeypatch: pytest.MonkeyPatch, channel: str, options: dict[str, Any]
) -> None:
    model = make_model(relay_channel=channel, token_shift=True)
    if options.get("relay_start") == "reference":
        options = {**options, "reference_model": make_model(relay_channel="none", seed=1)}
    few, many = waits_beside_steps(model, monkeypatch, **options)
    assert few == many
    assert few[0] == 2


def test_generate_criteria_wait_once_a_block(make_model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(ids: Tensor, scores: Any) -> Tensor:
        return ids[:, -1] < 0

    model = make_model(token_shift=True)
    few, many = waits_beside_steps(model, monkeypatch, stopping_criteria=[never])
    assert many[0] - few[0] == 4  # blocks
    assert many[1] == few[1]


def test_counting_waits_counts_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these would stop an accelerator's queue."""
    numbers = torch.arange(4)
    ways: list[Callable[[], Any]] = [
        lambda: bool(numbers.any()),
        lambda: int(numbers[1]),
        lambda: numbers[numbers > 1],
        lambda: numbers.clone().index_put_((numbers > 1,), torch.tensor(0)),
        lambda: numbers.nonzero(),
        lambda: numbers.unique(),
        lambda: torch.equal(numbers, numbers),
    ]
    for way in ways:
        with counting_waits(monkeypatch) as waits:
            way()
        assert waits.count == 1
    with counting_waits(monkeypatch) as waits:
        numbers.tolist()
        torch.nonzero_static(numbers, size=3)
        numbers[torch.tensor([0, 1])]
    assert (waits.count, waits.lists) == (0, 1)


# -- the head --------------------------------------------------------------------------------------------------------


@contextmanager
def watching_head(model: RelayForMaskedDiffusion) -> Iterator[list[tuple[int, bool]]]:
    """Of every call: positions that are scored, and whether only their best tokens are asked for."""
    seen: list[tuple[int, bool]] = []

    def note(module: Any, arguments: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((arguments[0].shape[:-1].numel(), "mask_token_id" in kwargs))

    handle = model.lm_head.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_generate_head_sees_candidates_only(make_model: Callable, cached: bool, fuse: bool) -> None:
    options = {"sub_block_size": 4, "use_sub_block_cache": cached, "fuse_commits": fuse, "unmasking_threshold": 1.0}
    model = make_model(open_channel=True, token_shift=False)
    with watching_head(model) as seen:
        run(model, prompt_of(10), max_new_tokens=14, **options)
    scored = [positions for positions, _ in seen if positions]
    # The prompt leaves two positions of a sub-block and a whole one, then comes a whole block.
    assert scored == [2, 1, 4, 3, 2, 1, 4, 3, 2, 1, 4, 3, 2, 1]
    # Prefills and commits score nothing.
    assert len(seen) - len(scored) == (1 if fuse else 2)


def test_generate_head_sees_candidates_of_rows_that_still_need_them(make_model: Callable) -> None:
    """A row that is complete waits for the other without being scored."""
    model, prompts = make_model(open_channel=True, token_shift=False), prompts_of((6, 3))
    with watching_head(model) as seen:
        run(model, padded(prompts, "left"), max_new_tokens=2, sub_block_size=None, unmasking_threshold=1.0)
        run(model, padded(prompts_of((5, 7)), "left"), max_new_tokens=1, sub_block_size=1)
    scored = [positions for positions, _ in seen if positions]
    assert scored[-1] == 2
    assert scored[0] == 2 + 5
    assert all(earlier > later for earlier, later in itertools.pairwise(scored[:-1]))


def test_generate_token_shift_head_scores_first_position_at_commit(make_model: Callable) -> None:
    model = make_model(open_channel=True, token_shift=True)
    with watching_head(model) as seen:
        run(model, prompt_of(8).expand(3, -1), max_new_tokens=16, sub_block_size=None, unmasking_threshold=0.0)
    assert [positions for positions, _ in seen if positions] == [3, 3 * 7, 3, 3 * 7]


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("policy", ["confidence_threshold", "confidence_budget", "fixed_count"])
def test_generate_greedy_never_asks_for_logits(make_model: Callable, token_shift: bool, policy: str) -> None:
    model = make_model(open_channel=True, token_shift=token_shift)
    with watching_head(model) as seen:
        run(model, padded(prompts_of(), "left"), max_new_tokens=20, unmasking_policy=policy, unmasking_threshold=1)
    assert all(best_only for positions, best_only in seen if positions)


def test_generate_greedy_holds_one_tile_of_logits(make_model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products are as wide as the tiles of its weight, here a few columns for a few positions."""
    from relay_hf.modeling import head_relay

    monkeypatch.setitem(head_relay.TILE_NUMBERS, "cpu", 40)
    model, widest = make_model(open_channel=True, token_shift=True), 0

    head = model.lm_head.weight

    def is_head(args: tuple) -> bool:
        return any(t.untyped_storage().data_ptr() == head.untyped_storage().data_ptr() for t in args)

    class Widths(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            nonlocal widest
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in (ATEN.mm, ATEN.addmm, ATEN.bmm) and result.numel() and is_head(args):
                widest = max(widest, result.shape[-1])
            return result

    with Widths():
        run(model, padded(prompts_of(), "left"), max_new_tokens=20)
    assert 0 < widest <= VOCAB_SIZE // 2
    with Widths():
        run(model, padded(prompts_of(), "left"), max_new_tokens=20, suppress_tokens=[MASK])
    assert widest == VOCAB_SIZE
