"""From `generate` to traces. Legend: B rows, L positions of the longest one, S positions of a block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..evaluation.forwards import count_costs
from ..modeling.outputs_relay import RelayGenerateOutput
from ..trainers.rollouts.rollout import by_block

NO_LABEL = -100


@dataclass(frozen=True)
class Trace:
    """One text, as a row of training data; the first three lists have a number for each token.

    Attributes:
        input_ids: the prompt and what was written, the stop token included.
        labels: the same where the model wrote, -100 where the prompt is.
        reveal_steps: number of the denoise step of its block, from 1, that revealed the token; 0 in the prompt, and for
            the first token of a block of a token-shift model that was known before the block was denoised.
        costs: forwards by kind and `new_tokens`, as `count_costs` counts them.
    """

    input_ids: list[int]
    labels: list[int]
    reveal_steps: list[int]
    costs: dict[str, int]

    @property
    def written(self) -> list[int]:
        """The tokens that the model wrote, in their order."""
        return [label for label in self.labels if label != NO_LABEL]


@torch.inference_mode()
def decode_traces(model: Any, prompts: Sequence[Sequence[int]], options: Mapping[str, Any]) -> list[Trace]:
    """Lets a model answer prompts as one batch.

    Args:
        model: a `RelayForMaskedDiffusion` in evaluation mode.
        prompts: B lists of ids; in a canvas, [MASK] where the model is to write.
        options: keyword arguments of `generate`.

    Raises:
        ValueError: `generate` refuses a prompt or an option.
    """
    width = max(map(len, prompts))
    rows = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]  # padded on the left
    seen = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    output = model.generate(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(seen, device=model.device),
        return_dict_in_generate=True,
        output_history=True,
        **options,
    )
    return traces_of(output, model.config.block_size)


def traces_of(output: RelayGenerateOutput, block_size: int | None) -> list[Trace]:
    """The traces of B rows.

    Args:
        output: what `generate(..., output_history=True)` returned.
        block_size: S, of the model; None = a row is one block.
    """
    history: Any = output.history
    traces = []
    for row, (tokens, revealed_at, given) in enumerate(
        zip(output.sequences.cpu(), history.revealed_at.cpu(), history.given.cpu(), strict=True)
    ):
        is_text = revealed_at >= 0
        ids, given = tokens[is_text], given[is_text]
        steps = steps_in_blocks(revealed_at[is_text], block_size)
        labels = ids.masked_fill(given, NO_LABEL)
        traces.append(Trace(ids.tolist(), labels.tolist(), steps.tolist(), count_costs(output, row)))
    return traces


def steps_in_blocks(revealed_at: Tensor, block_size: int | None) -> Tensor:
    """Counts the forwards of a row from the first that revealed something in a block, in every block by itself.

    Args:
        revealed_at: (L,) long, number of the row's denoise forward that revealed the token; 0 = none did.
        block_size: S; None = the row is one block.

    Returns:
        (L,) long, from 1; 0 where no denoise forward revealed the token.
    """
    forward = by_block(revealed_at[None], block_size)  # (blocks, S)
    first = forward.where(forward > 0, forward.amax(-1, keepdim=True)).amin(-1, keepdim=True)
    return (forward - first + 1).where(forward > 0, 0).flatten()[: len(revealed_at)]
