"""Many threads on one model: the results of one, and a configuration that no forward writes to."""

import copy
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from relay_hf import RelayCache, RelayConfig, RelayForMaskedDiffusion

from ..conftest import MASK, VOCAB_SIZE, text_config
from .decoding import prompt_of

IDS = torch.randint(1, MASK, (3, 24), generator=torch.Generator().manual_seed(0))


class Meeting(nn.Module):
    """Holds every thread in the middle of its forward until all of them are there."""

    def __init__(self, module: nn.Module, count: int) -> None:
        super().__init__()
        self.module, self.barrier = module, threading.Barrier(count)

    def forward(self, hidden: Tensor) -> Tensor:
        self.barrier.wait(30)
        return self.module(hidden)


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(60) for future in [pool.submit(call) for call in calls]]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is written to any configuration of a backbone from now on."""
    names: list[str] = []
    original = PreTrainedConfig.__setattr__

    def note(config: Any, name: str, value: Any) -> None:
        names.append(name)
        original(config, name, value)

    monkeypatch.setattr(PreTrainedConfig, "__setattr__", note)
    return names


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_forwards_that_overlap_equal_each_alone(make_model: Callable, attention: str) -> None:
    """The first prefills, the second drafts a block: one needs a mask, the other none."""
    model = make_model()
    model.set_attn_implementation(attention)
    before, saved = copy.deepcopy(vars(model.model.config)), model.config.to_json_string()
    calls = [lambda: model(IDS).logits, lambda: model(IDS[:, :8]).logits]
    expected = [call() for call in calls]
    model.model.norm = Meeting(model.model.norm, len(calls))
    for ours, theirs in zip(at_once(calls), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert vars(model.model.config) == before
    assert model.config.to_json_string() == saved


def test_generate_in_threads_equals_one_after_the_other(make_model: Callable) -> None:
    model = make_model(open_channel=True, token_shift=True)
    prompts = [prompt_of(length) for length in (3, 8, 13, 17)]
    expected = [model.generate(prompt, max_new_tokens=20) for prompt in prompts]
    for _ in range(3):
        calls = [lambda prompt=prompt: model.generate(prompt, max_new_tokens=20) for prompt in prompts]
        for ours, theirs in zip(at_once(calls), expected, strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_replicas_of_data_parallel_equal_the_model(make_model: Callable) -> None:
    """As `nn.DataParallel` makes them: plain attributes in place of parameters, and everything else is shared."""
    model = make_model(open_channel=True, token_shift=True)
    state = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(1))
    expected = model(IDS, relay_state=state)
    rows = [slice(0, 1), slice(1, 3)]
    replicas = [replica_of(model) for _ in rows]
    calls = [
        lambda replica=replica, row=row: replica(input_ids=IDS[row], relay_state=state[row])
        for replica, row in zip(replicas, rows, strict=True)
    ]
    outputs = at_once(calls)
    torch.testing.assert_close(torch.cat([output.logits for output in outputs]), expected.logits)
    torch.testing.assert_close(torch.cat([output.relay_state for output in outputs]), expected.relay_state)


def replica_of(module: nn.Module) -> Any:
    replica: Any = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.detach())
    return replica


@pytest.mark.parametrize("block_size", [8, None])
def test_no_forward_writes_to_a_configuration(make_model: Callable, written: list[str], block_size: int | None) -> None:
    model = make_model(block_size=block_size)
    written.clear()
    cache = RelayCache(config=model.config.text_config)
    with torch.no_grad():
        model(IDS)
        model(IDS[:, :8], cache=cache)
        model(IDS[:, 8:16], cache=cache)
    model.train()(IDS, labels=IDS).loss.backward()
    assert written == []


# -- what the backbone's configuration says of causality ---------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True, None])
@torch.no_grad()
def test_is_causal_of_the_configuration_changes_nothing(
    make_model: Callable, is_causal: bool | None, tmp_path: Path, written: list[str]
) -> None:
    expected = make_model()
    text = text_config(is_causal=is_causal)
    torch.manual_seed(0)
    model = RelayForMaskedDiffusion(RelayConfig(text_config=text, block_size=8, mask_token_id=MASK)).eval()
    assert text.is_causal is is_causal  # the caller's
    written.clear()
    for ids in (IDS, IDS[:, :8]):
        assert torch.equal(model(ids).logits, expected(ids).logits)
    prompt = prompt_of(13)
    assert torch.equal(model.generate(prompt, max_new_tokens=20), expected.generate(prompt, max_new_tokens=20))
    assert "is_causal" not in written
    model.save_pretrained(tmp_path)
    assert "is_causal" not in (tmp_path / "config.json").read_text()
    # A checkpoint of another library that has it.
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["text_config"]["is_causal"] = is_causal
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = RelayForMaskedDiffusion.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, expected(IDS).logits)


def test_configuration_that_was_handed_in_is_not_changed() -> None:
    text = text_config()
    before = text.to_dict()
    RelayConfig(text_config=text, block_size=8, mask_token_id=MASK, relay_readout="pre_norm")
    assert text.to_dict() == before
    assert before["vocab_size"] == VOCAB_SIZE
