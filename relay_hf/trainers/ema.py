"""Exponential moving average of the trainable weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

# Names in the state dictionary.
AVERAGE, OWN, UPDATES = "average.", "own.", "updates"


class WeightAverage:
    """Follows the trainable parameters of a model, in fp32.

    Args:
        model: parameters that require a gradient now are followed.
        decay: final decay; early on it is ramped up as (1 + n) / (10 + n) with n updates, so that the random
            initialisation is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.restart()

    def restart(self) -> None:
        """Forgets everything but the current weights."""
        self.updates = 0
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the current weights, after an optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [parameter.detach().float() for parameter in self.parameters.values()]
        get_ema_multi_avg_fn(decay)(list(self.average.values()), current, self.updates)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights inside, its own again afterwards."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            self._write(own)

    def copy_to_model(self) -> None:
        """Overwrites the model's weights by their average."""
        self._write(self.average)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, and the weights themselves, which a checkpoint of the averaged model would lack."""
        own = {name: parameter.detach().contiguous() for name, parameter in self.parameters.items()}
        named = {f"{AVERAGE}{name}": tensor for name, tensor in self.average.items()}
        return {
            **named,
            **{f"{OWN}{name}": tensor for name, tensor in own.items()},
            UPDATES: torch.tensor(self.updates),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the average, and the weights into the model."""
        self.updates = int(state[UPDATES])
        for name, average in self.average.items():
            average.copy_(state[AVERAGE + name])
        self._write({name: state[OWN + name] for name in self.parameters})

    @torch.no_grad()
    def _write(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
