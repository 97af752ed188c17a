"""A relay channel in one file, as another package writes it: a part of the hidden state, bounded and scaled.

    h'_i = tanh(h_i / softness), the first half of its numbers,  e_i <- e_i + [w h'_i ; 0]

w is learned and starts at 0: a fresh channel changes nothing.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from relay_hf import register_channel
from relay_hf.modeling import Channel, Readings


class BoundedChannel(Channel):
    """Carries the first half of the hidden state, bounded by a tanh."""

    options: ClassVar[dict[str, Any]] = {"softness": 1.0}
    citation: ClassVar[str] = "@misc{somebody2026bounded,\n  title = {Bounded Relays},\n  eprint = {2611.00001}\n}"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.softness = self.option_values(config)["softness"]
        self.weight = nn.Parameter(torch.empty(self.width))

    @classmethod
    def state_width(cls, config: Any) -> int:
        return config.text_config.hidden_size // 2

    @classmethod
    def check(cls, config: Any) -> None:
        softness = cls.option_values(config)["softness"]
        if not softness > 0:
            raise ValueError(f"`relay_options={{'softness': {softness}}}` must be above 0: 1 is usual.")

    @classmethod
    def sentence(cls, config: Any) -> str:
        softness = cls.option_values(config)["softness"]
        return f"half of a hidden state, bounded by a tanh of softness {softness}, added at its own place."

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)

    def inject(self, embeds: Tensor, state: Tensor) -> Tensor:
        return embeds + F.pad(self.weight * state, (0, embeds.shape[-1] - self.width))

    def next_state(self, readings: Readings) -> Tensor:
        return torch.tanh(readings.read_out[..., : self.width] / self.softness)


register_channel("bounded", BoundedChannel)
