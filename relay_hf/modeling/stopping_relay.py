"""What ends a row of `generate`, and the token behind its end."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, MaxLengthCriteria


@dataclass(frozen=True)
class Stopping:
    """What ends a row, beside its length.

    Args:
        token_ids: (n,) tokens that end a row, or None.
        padding: token that is written behind a row's end.
        criteria: further criteria, asked about every prefix of a row when its block is complete.
    """

    token_ids: Tensor | None
    padding: int
    criteria: list[Callable[..., Tensor]]

    @classmethod
    def of(
        cls, generation_config: GenerationConfig, criteria: Iterable[Callable[..., Tensor]], mask_token_id: int
    ) -> "Stopping":
        """Parses the options of one `generate`, with the criteria that transformers made of them."""
        token_ids = generation_config._eos_token_tensor
        padding = padding_token(generation_config._pad_token_tensor, token_ids, mask_token_id)
        # The block decoder looks for the length and stop tokens itself.
        return cls(token_ids, padding, [c for c in criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)])


def padding_token(pad_token_id: Tensor | None, stop_token_ids: Tensor | None, mask_token_id: int) -> int:
    """The padding token, or without one that is not [MASK], a stop token or 0; a scalar, (n,) ids, and a number."""
    if pad_token_id is not None and int(pad_token_id) != mask_token_id:
        return int(pad_token_id)
    if stop_token_ids is not None and len(stop_token_ids):
        return int(stop_token_ids[0])
    return 1 if mask_token_id == 0 else 0
