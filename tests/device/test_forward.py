"""Forwards and their gradients on the device equal those of the CPU, for every channel, alignment and block."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from relay_hf import RelayForMaskedDiffusion
from relay_hf.testing import tiny_model

from ..conftest import MASK

CHANNELS = ("none", "layer_norm", "residual_context", "soft_mask")
IDS = torch.tensor([[1, 2, 3, 4, MASK, 6, MASK, MASK], [9, MASK, 8, 7, 6, MASK, 5, MASK]])
VISIBLE = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [1] * 8])


def loss_and_state(model: RelayForMaskedDiffusion, device: Any, **inputs: Any) -> tuple[Tensor, Tensor | None]:
    """A loss at the masks; two forwards, the second of which receives what the first has left."""
    ids = IDS.to(device)
    labels = ids.roll(1, 0).where(ids == MASK, -100)
    state = model(ids, **inputs).relay_state
    output = model(ids, relay_state=state, labels=labels, **inputs)
    return output.loss, output.relay_state


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("block_size", [4, None])
@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("channel", CHANNELS)
def test_forward_and_gradients_equal_cpu(
    device: torch.device, channel: str, token_shift: bool, block_size: int | None, is_padded: bool
) -> None:
    model = tiny_model(open_channel=True, relay_channel=channel, token_shift=token_shift, block_size=block_size)
    numbers = []
    for place in ("cpu", device):
        copied = copy.deepcopy(model).to(place)
        inputs = {"attention_mask": VISIBLE.to(place)} if is_padded else {}
        loss, state = loss_and_state(copied, place, **inputs)
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in copied.named_parameters() if p.grad is not None}
        numbers.append((loss.cpu(), None if state is None else state.detach().cpu(), gradients))
    torch.testing.assert_close(numbers[0], numbers[1], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("channel", CHANNELS)
def test_forward_bf16_equals_cpu_within_rounding(device: torch.device, channel: str) -> None:
    model = tiny_model(open_channel=True, relay_channel=channel, block_size=4).to(torch.bfloat16)
    with torch.no_grad():
        ours, theirs = (
            loss_and_state(copy.deepcopy(model).to(place), place)[0].float().cpu() for place in ("cpu", device)
        )
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
