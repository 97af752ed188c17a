"""Stopping each row of a batch at its own stop texts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class StopTexts(StoppingCriteria):
    """True for a row whose new tokens hold one of the texts; the prompt does not count.

    Args:
        tokenizer: turns new tokens into text, special tokens included.
        texts: any of them ends a row; empty ones are left out.
        prompt_length: P, columns of the prompts.
    """

    # Not lm-eval's `stop_sequences_criteria`, which end a batch once all of its rows have held the same text: how far a
    # row is decoded, and so its forwards, would depend on its neighbours.

    def __init__(self, tokenizer: Any, texts: Sequence[str], prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.texts = [text for text in texts if text]
        self.prompt_length = prompt_length
        # Asked at every token, so a text can only be new at the end. A token has at least a byte, but for special ones.
        self.window = 2 + max((len(text.encode()) for text in self.texts), default=0)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B, P + new tokens) -> (B,) bool."""
        ends = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :][:, -self.window :])
        return torch.tensor([any(text in end for text in self.texts) for end in ends], device=input_ids.device)
