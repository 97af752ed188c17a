"""The attention function "relay_blocks" means what dense masks mean, computed by SDPA or variable-length attention."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import varlen
from transformers import AttentionInterface

from relay_hf import RelayCache, RelayForMaskedDiffusion
from relay_hf.modeling import attention_blocks_relay
from relay_hf.modeling.attention_blocks_relay import BLOCK_ATTENTION, attend_in_blocks, block_pattern
from relay_hf.modeling.prefix_relay import Prefix

from ..conftest import MASK
from .decoding import padded, prompts_of, run

CONFIG = SimpleNamespace(hidden_size=32, num_attention_heads=4, head_dim=8)


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    **options: Any,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, one sequence after the other; checks what its kernel demands."""
    assert options.keys() == {"scale", "enable_gqa", "seqused_k"}
    lengths, is_grouped = options["seqused_k"], query.shape[1] != key.shape[1]
    for counts in (cu_seq_q, cu_seq_k, lengths):
        assert counts.dtype == torch.int32
        assert counts.is_contiguous()
    assert len(cu_seq_q) == len(cu_seq_k) == len(lengths) + 1
    assert cu_seq_q[-1] == len(query)
    assert int(cu_seq_q.diff().max()) <= max_q
    assert int(lengths.max()) <= max_k
    assert options["enable_gqa"] == is_grouped
    output = torch.zeros(*query.shape[:2], value.shape[2], dtype=query.dtype)
    for begin, end, first, number in zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k, lengths, strict=False):
        if number:
            q, k, v = (
                t.transpose(0, 1) for t in (query[begin:end], *(t[first : first + number] for t in (key, value)))
            )
            attended = F.scaled_dot_product_attention(q, k, v, scale=options["scale"], enable_gqa=is_grouped)
            output[begin:end] = attended.transpose(0, 1)
    return output


@pytest.fixture
def as_runs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Computes everything as on a CUDA device in half precision; the keys of every call."""
    keys: list[Tensor] = []

    def recorded(query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        keys.append(key)
        return plain_varlen(query, key, *args, **options)

    monkeypatch.setattr(attention_blocks_relay, "takes_runs", lambda config, embeds: True)
    monkeypatch.setattr(attention_blocks_relay, "varlen_attn", recorded)
    return keys


def test_plain_varlen_has_the_arguments_of_torch() -> None:
    ours, theirs = (inspect.signature(function).parameters for function in (plain_varlen, varlen.varlen_attn))
    assert list(ours)[:7] == list(theirs)[:7]
    assert {"scale", "enable_gqa", "seqused_k"} <= theirs.keys()


def dense(visible: Tensor, cached: int, size: int) -> Tensor:
    """(n, 1, L, K) bool"""
    column = torch.arange(visible.shape[1])
    no_later = column // size <= column[cached:, None] // size
    return (no_later & visible[:, None])[:, None]


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """A ragged batch: rows that begin and end anywhere, behind whole blocks, with heads that share keys."""
    size, cached, blocks = draw(st.integers(1, 9)), draw(st.integers(0, 3)), draw(st.integers(1, 8))
    total = (cached + blocks) * size - draw(st.integers(0, size - 1))
    ends = st.tuples(st.integers(0, total), st.integers(0, total)).map(sorted)
    runs = draw(st.lists(ends, min_size=1, max_size=4))
    column = torch.arange(total)
    visible = torch.stack([(column >= first) & (column < stop) for first, stop in runs])
    return {"size": size, "cached": cached * size, "visible": visible, "groups": draw(st.sampled_from([1, 2]))}


def layer(groups: int) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = groups, False
    return module


def states_of(visible: Tensor, cached: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, total = visible.shape
    sizes = [(rows, total - cached, 4), (rows, total, 4 // groups), (rows, total, 4 // groups)]
    query, key, value = (torch.randn(*size, 8, generator=generator).transpose(1, 2) for size in sizes)
    return query, key, value


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize("hides", [False, True])
@given(batch=batches())
@settings(deadline=None, max_examples=80)
def test_columns_and_runs_equal_a_dense_mask(batch: dict[str, Any], hides: bool, runs: bool) -> None:
    size, cached, groups = batch["size"], batch["cached"], batch["groups"]
    if size == 1 and not runs:  # one column for every query is a mask of transformers' own
        return
    visible = batch["visible"] if hides else torch.ones_like(batch["visible"])
    query, key, value = states_of(visible, cached, groups)
    expected, _ = AttentionInterface()["sdpa"](layer(groups), query, key, value, dense(visible, cached, size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_blocks_relay, "takes_runs", lambda *args: runs)
        patch.setattr(attention_blocks_relay, "varlen_attn", plain_varlen)
        embeds = torch.zeros(len(query), query.shape[2], 32)
        mask = block_pattern(CONFIG, embeds, visible if hides else None, Prefix([], cached), size)
        assert mask is None or (mask.dtype == torch.int32) == runs
        output, _ = attend_in_blocks(layer(groups), query, key, value, mask)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


OPTIONS: list[dict[str, Any]] = [{}, {"fuse_commits": True}, {"sub_block_size": 4, "use_sub_block_cache": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [(3, 13, 8), (13, 13, 13)], ids=["ragged", "even"])
@pytest.mark.parametrize("block_size", [8, None])
def test_generate_by_runs_and_by_dense_masks_same_text(
    make_model: Callable, as_runs: list[Tensor], block_size: int | None, lengths: tuple[int, ...], options: dict
) -> None:
    """Rows wait for each other and end at different times."""
    if block_size is None and "fuse_commits" in options:
        pytest.skip("a canvas has no commits")
    model = make_model(open_channel=True, token_shift=True, block_size=block_size)
    inputs = padded(prompts_of(lengths), "left")
    by_runs = run(model, inputs, max_new_tokens=20, **options)
    assert as_runs or lengths == (13, 13, 13)
    model.set_attn_implementation("sdpa")
    expected = run(model, inputs, max_new_tokens=20, **options)
    assert torch.equal(by_runs.sequences, expected.sequences)
    assert torch.equal(by_runs.denoise_forwards, expected.denoise_forwards)


def test_generate_by_runs_never_copies_keys(make_model: Callable, as_runs: list[Tensor]) -> None:
    """Also while rows wait: all forwards read the memory of the cache, which is taken once and when rows end."""
    model = make_model(open_channel=True)
    output = run(model, padded(prompts_of((3, 13, 8)), "left"), max_new_tokens=20)
    assert len(set(output.denoise_forwards.tolist())) > 1
    assert len({key.data_ptr() for key in as_runs}) <= 3 * model.config.text_config.num_hidden_layers


def test_generate_without_padding_denoises_without_a_mask(make_model: Callable) -> None:
    model, masks = make_model(open_channel=True), set()
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: masks.add(tuple(kwargs["attention_mask"].shape)), with_kwargs=True
    )
    run(model, torch.stack(prompts_of((13, 13))), max_new_tokens=20)
    assert masks == {(1, 1, 0, 0)}


@torch.no_grad()
def test_prefill_of_a_long_prompt_takes_memory_of_its_length(make_model: Callable) -> None:
    """A dense mask would have a row for every position."""
    model, most = make_model(block_size=32, text={"max_position_embeddings": 8192}), []
    for length in (1024, 4096):
        ids = torch.randint(1, MASK, (1, length), generator=torch.Generator().manual_seed(0))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(ids, cache=RelayCache(config=model.config.text_config), logits_to_keep=ids.new_empty(0))
        most.append(max(event.self_cpu_memory_usage for event in profile.events()))
    assert most[1] <= 5 * most[0]


def test_gradients_equal_those_of_dense_masks(make_model: Callable) -> None:
    model = make_model(open_channel=True)
    ids, gradients = torch.randint(1, MASK, (2, 40), generator=torch.Generator().manual_seed(0)), []
    for name in (BLOCK_ATTENTION, "sdpa"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention"])
def test_default_attention_is_not_saved_and_gives_way_to_a_choice(
    make_model: Callable, tmp_path: Path, name: str
) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    assert BLOCK_ATTENTION not in (tmp_path / "config.json").read_text()
    load = RelayForMaskedDiffusion.from_pretrained
    for loaded in (load(tmp_path), copy.deepcopy(load(tmp_path)), RelayForMaskedDiffusion(model.config)):
        assert loaded.config._attn_implementation == loaded.model.config._attn_implementation == BLOCK_ATTENTION
    chosen = load(tmp_path, attn_implementation=name)
    assert chosen.config._attn_implementation == chosen.model.config._attn_implementation == name


def test_soft_capped_scores_are_refused_as_in_sdpa() -> None:
    query, key, value = states_of(torch.ones(1, 8, dtype=torch.bool), 0, 1)
    with pytest.raises(ValueError, match="softcap"):
        attend_in_blocks(layer(1), query, key, value, torch.ones(1, 1, 1, 8, dtype=torch.bool), softcap=1.0)
