"""The parameters of the relay channel: their names, their precision and their group in the optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.optim import Optimizer

from ..modeling import RelayForMaskedDiffusion
from .relay_config import RelayTrainerConfig


def is_channel_parameter(name: str) -> bool:
    """Whether a parameter name belongs to the relay channel, also inside a PEFT wrapper."""
    return "relay" in name.split(".")


@contextmanager
def keeps_channel_precise(base: RelayForMaskedDiffusion) -> Iterator[None]:
    """Inside, `SFTTrainer` prepares the model; afterwards the channel is in fp32, with the values it had before.

    Anything coarser would lose its small updates, but `model.to(torch.bfloat16)` takes the channel along, and
    `SFTTrainer` puts everything that is trained on quantised weights into bf16.
    """
    before = {name: parameter.detach().clone() for name, parameter in _trained_channel(base).named_parameters()}
    yield
    if any(parameter.dtype != torch.float32 for parameter in base.relay.parameters()):
        base.relay.float()
        with torch.no_grad():
            for name, parameter in _trained_channel(base).named_parameters():
                parameter.copy_(before[name])


def _trained_channel(base: RelayForMaskedDiffusion) -> nn.Module:
    """The channel; where PEFT keeps two sets of its parameters, the one that it trains."""
    channel: Any = base.relay
    if isinstance(channel, ModulesToSaveWrapper) and channel.active_adapters:
        return channel.modules_to_save[channel.active_adapters[0]]
    return channel


def separate_channel(optimizer: Optimizer, model: nn.Module, args: RelayTrainerConfig) -> None:
    """Moves the channel's parameters into groups of their own, with the learning rate and weight decay of `args`.

    A channel that the objective does not use is left out: it would have no state to save, which FSDP2 refuses to load
    again.
    """
    own = {"lr": args.relay_learning_rate, "weight_decay": args.relay_weight_decay}
    own = {name: value for name, value in own.items() if value is not None}
    channel = {id(parameter) for name, parameter in model.named_parameters() if is_channel_parameter(name)}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in channel]
        group["params"] = [p for p in group["params"] if id(p) not in channel]
        if moved and args.recipe.uses_channel:
            optimizer.add_param_group({**group, "params": moved, **own})
