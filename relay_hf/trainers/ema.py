"""Exponential moving average of the trainable weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Names in the state dictionary.
AVERAGE, OWN, UPDATES = "average.", "own.", "updates"
# What FSDP's own activation checkpointing inserts into names of parameters.
CHECKPOINTED = "_checkpoint_wrapped_module."


class WeightAverage:
    """Follows the trainable parameters of a model, in fp32. Under FSDP2 each process follows its part of them.

    Args:
        model: its parameters that require a gradient are followed; it may be sharded later, if `restart` follows.
        decay: final decay; early on it is ramped up as (1 + n) / (10 + n) with n updates, so that the random
            initialisation is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.updates = 0
        self.average = self._weights()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The followed parameters as they are now: sharding replaces them."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # else a module may hold, and go on with, a gathered copy of old weights
        named = ((name.replace(CHECKPOINTED, ""), p) for name, p in self.model.named_parameters())
        return {name: p for name, p in named if p.requires_grad}

    def restart(self) -> None:
        """Forgets everything but the current weights."""
        self.updates, self.average = 0, self._weights()

    def _weights(self) -> dict[str, Tensor]:
        """A copy of the current weights, in fp32."""
        return {name: _local(p).float().clone() for name, p in self.parameters().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the current weights, after an optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [_local(parameter).float() for parameter in self.parameters().values()]
        get_ema_multi_avg_fn(decay)(list(self.average.values()), current, self.updates)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights inside, its own again afterwards."""
        if self.updates == 0:  # they are the same, and the model may be sharded inside
            yield
            return
        own = {name: _local(parameter).clone() for name, parameter in self.parameters().items()}
        self.copy_to_model()
        try:
            yield
        finally:
            self._write(own)

    def copy_to_model(self) -> None:
        """Overwrites the model's weights by their average."""
        self._write(self.average)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, and the weights themselves, which a checkpoint of the averaged model would lack.

        All processes must call this together; what it returns is whole, and in main memory.
        """
        state = {UPDATES: torch.tensor(self.updates)}
        for name, parameter in self.parameters().items():
            state[AVERAGE + name] = _whole(self.average[name], parameter)
            state[OWN + name] = _whole(_local(parameter), parameter)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the average, and the weights into the model."""
        self.restart()
        self.updates = int(state[UPDATES])
        parameters = self.parameters()
        for name, average in self.average.items():
            average.copy_(_part(state[AVERAGE + name], parameters[name]))
        self._write({name: _part(state[OWN + name], p) for name, p in parameters.items()})

    @torch.no_grad()
    def _write(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters().items():
            _local(parameter).copy_(weights[name])


class FollowWeights(TrainerCallback):
    """Updates the average after each optimizer step and leaves it in the model when training ends."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.average.updates == 0:
            self.average.restart()  # the model may be sharded by now

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.average.update()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.average.copy_to_model()


def _local(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter; writing into it changes the parameter."""
    parameter = parameter.detach()
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _whole(local: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that is sharded like the parameter, put together in main memory."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        shape, stride = parameter.shape, parameter.stride()
        local = DTensor.from_local(local, mesh, placements, shape=shape, stride=stride).full_tensor()
    return local.cpu().contiguous()


def _part(whole: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of a tensor that is sharded like the parameter."""
    if not isinstance(parameter, DTensor):
        return whole
    # Every process has read the whole tensor: nothing is sent.
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole.to(_local(parameter).device), mesh, placements, src_data_rank=None).to_local()
