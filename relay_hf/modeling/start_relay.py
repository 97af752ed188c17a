"""State of a block's first denoise step where `relay_start` overrides the configuration's `relay_initial_state`.

Residual context diffusion compares such starts (arXiv 2601.22954 v2, Table 5). None of them reveals a token.

Legend: B rows still being decoded, n of them that take part, S positions of a block, N masked ones among them, D hidden
size, V vocabulary.
"""

from typing import Any, ClassVar

from torch import Tensor

from .cache_relay import rows_of
from .passes_relay import Draft, ForwardPasses


class RelayStart:
    """Writes the state of a block's first denoise step into the cache; each start is a subclass.

    `denoise_forwards` and `reference_forwards` are the cost for a row that takes part, once per block.

    Args:
        reference: the frozen model that was given, or None.
    """

    denoise_forwards: ClassVar[int] = 0
    reference_forwards: ClassVar[int] = 0

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def __call__(self, passes: ForwardPasses, draft: Draft, masked: Tensor) -> None:
        """Starts a block.

        Args:
            passes: at the beginning of the block.
            draft: its first denoise forward, still to come; it has the rows that take part.
            masked: (B, S) bool, each row's own positions that are still hidden.
        """
        raise NotImplementedError


class SelfStart(RelayStart):
    """The state that one pass of the model itself over the block leaves, with nothing injected.

    If the block before is still to be committed, that pass does it.
    """

    denoise_forwards = 1

    def __call__(self, passes: ForwardPasses, draft: Draft, masked: Tensor) -> None:
        passes.look(draft)


class ReferenceStart(RelayStart):
    """The predictions of a frozen reference model for the block, which it sees behind all of the row's text.

    It runs without a cache, once per block, so that its cost grows with the text.
    """

    reference_forwards = 1

    def __call__(self, passes: ForwardPasses, draft: Draft, masked: Tensor) -> None:
        grid, model, taking_part, stop = passes.grid, passes.model, draft.taking_part, passes.columns.stop
        device = self.reference.get_input_embeddings().weight.device
        visible, positions = grid.attention_mask(stop), grid.positions(0, stop)
        if visible is not None:
            visible, positions = rows_of(visible, taking_part).to(device), rows_of(positions, taking_part)
        rows, places = rows_of(masked, taking_part).nonzero().unbind(-1)
        output = self.reference(
            rows_of(grid.tokens[:, :stop], taking_part).to(device),
            attention_mask=visible,
            position_ids=positions.to(device),
            logits_to_keep=(rows.to(device), (passes.columns.start + places).to(device)),
            unscored=True,
            output_relay_state=False,
        )
        state = model.relay.state_of(
            output.head_inputs,
            masked & draft.active[:, None],
            lambda some: self.reference.lm_head(some).to(masked.device),
            model.get_input_embeddings(),
        )
        passes.cache.write_relay_state(state)


STARTS: dict[str, type[RelayStart]] = {"self": SelfStart, "reference": ReferenceStart}


def make_start(name: str | None, reference: Any) -> RelayStart | None:
    """The start called `name`, or None for the configuration's `relay_initial_state`."""
    return None if name is None else STARTS[name](reference)
