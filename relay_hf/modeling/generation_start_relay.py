"""Initial relay state of a block, when the option `relay_start` overrides `config.relay_initial_state`.

Residual context diffusion compares such starts (arXiv 2601.22954 v2, Table 5). None of them reveals a token.

Legend: B rows still being decoded, S positions of a block, N masked ones among them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass
class RelayStart:
    """Writes the state of a block's first denoise step into the cache; each start is a subclass.

    Args:
        reference: the frozen model that was given, or None.

    Attributes:
        denoise_forwards, reference_forwards: forwards that the start of a block costs each row that takes part.
    """

    reference: Any
    denoise_forwards: ClassVar[int] = 0
    reference_forwards: ClassVar[int] = 0

    def __call__(self, decoder: Any, block: Any, step: Any) -> None:
        """Starts a block.

        Args:
            decoder: the `BlockDecoder`.
            block: the decoder's block in work, which no forward has run yet.
            step: the block's first step, which is about to run.
        """
        decoder.grid.denoise_forwards += step.active * self.denoise_forwards
        decoder.grid.reference_forwards += step.active * self.reference_forwards


class SelfStart(RelayStart):
    """The state that one forward of the model itself leaves, with nothing injected.

    If the block before is still to be committed, that forward commits it.
    """

    denoise_forwards = 1

    def __call__(self, decoder: Any, block: Any, step: Any) -> None:
        super().__call__(decoder, block, step)
        decoder.look(block, step)


class ReferenceStart(RelayStart):
    """The state that a frozen reference model's predictions of the block make, given all of the row's text before it.

    The reference runs without a cache, once per block, so that its cost grows with the text.
    """

    reference_forwards = 1

    def __call__(self, decoder: Any, block: Any, step: Any) -> None:
        super().__call__(decoder, block, step)
        grid, model, begin, stop = decoder.grid, decoder.model, block.columns.start, block.columns.stop
        device = self.reference.get_input_embeddings().weight.device
        visible = grid.attention_mask(stop)
        masked = step.masked & step.active[:, None]
        # The forward runs at least these masks; where it runs more, positions that nobody reads fill up.
        rows, places = torch.nonzero_static(masked, size=step.forwards[0].masks, fill_value=0).unbind(-1)
        output = self.reference(
            grid.tokens[:, :stop].to(device),
            attention_mask=None if visible is None else visible.to(device),
            position_ids=grid.positions(0, stop).to(device),
            logits_to_keep=(rows.to(device), (begin + places).to(device)),
            unscored=True,
            output_relay_state=False,
        )
        state = model.relay.state_of(
            output.head_inputs,
            masked,
            lambda some: self.reference.lm_head(some).to(masked.device),
            model.get_input_embeddings(),
        )
        decoder.cache.write_relay_state(state)


STARTS: dict[str, type[RelayStart]] = {"self": SelfStart, "reference": ReferenceStart}
