"""The stand-in itself: it refuses what CUDA refuses, and counts what CUDA waits for."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from . import fakegpu


@pytest.fixture
def tensors(device: torch.device) -> SimpleNamespace:
    """`x` on the device and `y` on the CPU, 4 by 5, and a linear layer on the device."""
    torch.manual_seed(0)
    y = torch.randn(4, 5)
    return SimpleNamespace(x=y.to(device), y=y, linear=torch.nn.Linear(5, 3).to(device), device=device)


WRONG: dict[str, Callable[[Any], Any]] = {
    "add": lambda t: t.x + t.y,
    "matrix product": lambda t: t.x @ t.y.T,
    "cat": lambda t: torch.cat([t.x, t.y]),
    "stack": lambda t: torch.stack([t.x.sum(), torch.tensor(1.0)]),
    "where": lambda t: torch.where(t.x > 0, t.x, t.y),
    "index_select": lambda t: t.x.index_select(0, torch.tensor([0])),
    "gather": lambda t: t.x.gather(0, torch.zeros(1, 5, dtype=torch.long)),
    "embedding": lambda t: F.embedding(torch.tensor([1]), t.x),
    "masked_fill": lambda t: t.x.masked_fill(t.y > 0, 0.0),
    "layer_norm": lambda t: F.layer_norm(t.x, (5,), torch.ones(5), torch.ones(5)),
    "generator": lambda t: torch.rand(3, device=t.device, generator=torch.Generator()),
    "integer matrix product": lambda t: t.x.long() @ t.x.long().T,
    "CPU tensor at device indices": lambda t: t.y[torch.tensor([0], device=t.device)],
    "searchsorted": lambda t: torch.searchsorted(t.x.sort(-1)[0], t.y),
    "index_copy": lambda t: t.x.index_copy(0, torch.tensor([0]), t.x[:1]),
    "masked_scatter": lambda t: t.x.masked_scatter(t.x > 0, t.y),
    "isin": lambda t: torch.isin(t.x.long(), torch.tensor([1, 2])),
    "attention": lambda t: F.scaled_dot_product_attention(t.x[None], t.y[None], t.y[None]),
}


@pytest.mark.parametrize("name", WRONG)
def test_device_wrong_program_raises(tensors: SimpleNamespace, name: str) -> None:
    with pytest.raises(RuntimeError, match=r"same device|generator|not implemented|indices should be"):
        WRONG[name](tensors)


# Waits, and a program.
WAITS: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "item": (1, lambda t: t.x.sum().item()),
    "bool": (1, lambda t: bool((t.x > 0).any())),
    "tolist": (1, lambda t: t.x.tolist()),
    "cpu": (1, lambda t: t.x.cpu()),
    "cpu, run on": (0, lambda t: t.x.to("cpu", non_blocking=True)),
    "nonzero": (1, lambda t: t.x.nonzero()),
    "nonzero_static": (0, lambda t: torch.nonzero_static(t.x > 0, size=3)),
    "where": (1, lambda t: torch.where(t.x > 0)),
    "read by mask": (1, lambda t: t.x[t.x > 0]),
    "masked_select": (1, lambda t: t.x.masked_select(t.x > 0)),
    "write a number by mask": (0, lambda t: t.x.clone().__setitem__(t.x > 0, 0.0)),
    "write numbers by mask": (1, lambda t: t.x.clone().__setitem__(t.x > 0, t.x[0, :1].expand(int((t.y > 0).sum())))),
    "masked_fill": (0, lambda t: t.x.masked_fill(t.x > 0, 0)),
    "masked_scatter": (0, lambda t: t.x.masked_scatter(t.x > 0, t.x)),
    "repeat by numbers": (1, lambda t: t.x.repeat_interleave(torch.ones(4, dtype=torch.long, device=t.device), 0)),
    "repeat twice": (0, lambda t: t.x.repeat_interleave(2, 0)),
    "unique": (1, lambda t: t.x.unique()),
    "equal": (1, lambda t: torch.equal(t.x, t.x)),
    "isin few": (0, lambda t: torch.isin(t.x.long(), torch.arange(2, device=t.device))),
    "isin many": (1, lambda t: torch.isin(t.x.long(), torch.arange(99, device=t.device))),
    "iterate": (0, lambda t: list(t.x)),
    "slice by a tensor": (1, lambda t: t.x[: t.x[0, 0].long().clamp(0, 2)]),
    "sort": (0, lambda t: t.x.sort(stable=True)),
    "make": (0, lambda t: torch.tensor([1, 2], device=t.device)),
    "synchronize": (1, lambda t: torch.accelerator.synchronize()),
    "step": (0, lambda t: one_step(t.linear, t.x)),
}


@pytest.mark.parametrize("name", WAITS)
def test_device_counts_waits(tensors: SimpleNamespace, name: str) -> None:
    waits, program = WAITS[name]
    with fakegpu.count() as counts:
        program(tensors)
    assert counts.waits.total() == waits, counts.report()


def one_step(linear: torch.nn.Linear, x: torch.Tensor) -> None:
    linear(x).sum().backward()
    torch.nn.utils.clip_grad_norm_(linear.parameters(), 1.0)
    torch.optim.AdamW(linear.parameters(), fused=True).step()


def test_device_small_cpu_tensors_are_taken_where_cuda_takes_them(tensors: SimpleNamespace) -> None:
    x, y = tensors.x, tensors.y
    assert torch.equal((x + torch.tensor(2.0)).cpu(), y + 2)
    assert torch.equal(torch.where(x > 0, x, torch.tensor(2.0)).cpu(), torch.where(y > 0, y, 2.0))
    assert torch.equal(x[torch.tensor([0, 1])].cpu(), y[:2])


def test_device_backward_equals_cpu(tensors: SimpleNamespace) -> None:
    on_cpu = torch.nn.Linear(5, 3)
    on_cpu.load_state_dict({name: value.cpu() for name, value in tensors.linear.state_dict().items()})
    for linear, x in ((tensors.linear, tensors.x), (on_cpu, tensors.y)):
        linear(x).pow(2).sum().backward()
    torch.testing.assert_close(tensors.linear.weight.grad.cpu(), on_cpu.weight.grad)


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("is_masked", [False, True])
def test_device_attention_is_one_launch_each_way_and_equals_cpu(
    device: torch.device, heads: int, is_masked: bool
) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, heads, 6, 8), torch.randn(2, heads, 6, 8)
    mask = torch.zeros(3, 6).where(torch.rand(3, 6) > 0.3, -torch.inf) if is_masked else None

    def run(to: Any) -> tuple[Any, list]:
        inputs = [tensor.to(to).requires_grad_() for tensor in (query, key, value)]
        bias = None if mask is None else mask.to(to)
        with fakegpu.count() as counts:
            output = F.scaled_dot_product_attention(*inputs, attn_mask=bias, enable_gqa=heads < 4)
            output.backward(torch.ones_like(output) * torch.arange(3, device=to)[:, None])
        return counts.operations, [tensor.cpu() for tensor in (output, *(each.grad for each in inputs))]

    operations, ours = run(device)
    torch.testing.assert_close(ours, run("cpu")[1])
    assert (operations["attention"], operations["attention backward"]) == (1, 1)


def test_device_autocast_casts_as_cuda_does(tensors: SimpleNamespace) -> None:
    with torch.autocast(fakegpu.NAME, dtype=torch.bfloat16):
        assert tensors.linear(tensors.x).dtype == torch.bfloat16
        assert F.layer_norm(tensors.x.bfloat16(), (5,)).dtype == torch.float32
        assert tensors.x.bfloat16().softmax(-1).dtype == torch.float32


def test_device_counts_memory(device: torch.device) -> None:
    module = torch.get_device_module(device)
    module.reset_peak_memory_stats()
    live = module.memory_allocated()
    held = torch.empty(1000, device=device)
    assert module.memory_allocated() == module.max_memory_allocated() == live + 4000
    del held
    assert module.memory_allocated() == live
