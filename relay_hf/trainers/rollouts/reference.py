"""The reference model of residual context training. Legend: B rows, L positions, N masked ones, D hidden size."""

from typing import Any, cast

from torch import Tensor

from ...modeling import RelayForMaskedDiffusion
from ...modeling.channel_relay import DistributionChannel
from ...modeling.outputs_relay import Readings, RelayOutput
from ...modeling.prefix_relay import Prefix


class Reference:
    """A frozen model whose predictions make the state of another one (stage 2 of arXiv 2601.22954).

    Called like a model, and passed to `make_denoiser` as one, so that it sees noisy text as the trained model does. Its
    predictions are summarised with the channel and the embeddings of the trained model, whose input they become.

    Args:
        model: the reference, in evaluation mode; its own channel gets no state.
        target: the trained model, whose channel reads distributions.
    """

    def __init__(self, model: RelayForMaskedDiffusion, target: RelayForMaskedDiffusion) -> None:
        self.model = model
        self.config = model.config
        self.target = target

    def __call__(
        self, input_ids: Tensor, logits_to_keep: Tensor, output_relay_state: bool = True, **kwargs: Any
    ) -> RelayOutput:
        """A pass of the reference; with `output_relay_state`, its (B, L, D + 1) state for the target."""
        if not output_relay_state:
            return self.model(input_ids, logits_to_keep=logits_to_keep, output_relay_state=False, **kwargs)
        output = self.model(input_ids, logits_to_keep=0, output_relay_state=False, **kwargs)
        head_inputs, is_masked = output.head_inputs, input_ids == self.config.mask_token_id
        prefix, embeddings = cast(Prefix, kwargs["cache"]), self.target.get_input_embeddings()
        seen = prefix.rows_for_channel(head_inputs, head_inputs, is_masked)
        channel = cast(DistributionChannel, self.target.relay)
        output.relay_state = channel.next_state(Readings(*seen, self._head, embeddings, prefix.masks))
        return output

    def _head(self, hidden: Tensor) -> Tensor:
        # Under autocast, accelerate turns every output of the model into fp32, whatever its dtype.
        return self.model.lm_head(hidden.to(self.model.dtype))
