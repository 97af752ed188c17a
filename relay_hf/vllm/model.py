"""The model as vLLM runs it: one of vLLM's own backbones, and the library's channel beside it.

Legend: T positions of a step, those of all its requests one after the other; D hidden size, V vocabulary, N positions
that the step scores.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .internals import init_vllm_registered_model, maybe_prefix
from .plan import StepPlan
from .state import RelayModelState

CHANNEL = "relay."


class RelayForVllm(nn.Module):
    """A relay model.

    Args:
        vllm_config: configuration of vLLM, whose `hf_config` is a `RelayConfig`.
        prefix: of the names of parameters.

    Raises:
        ValueError: vLLM has no backbone of this kind.

    Attributes:
        step: what the step in work is about; None where vLLM only measures memory, or warms up.
        hidden: (n, D) raw outputs at the positions that the step asked for, N scored ones first.
    """

    @staticmethod
    def get_model_state_cls() -> type[RelayModelState]:
        return RelayModelState

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        config.text_config.tie_word_embeddings = config.tie_word_embeddings
        self.backbone = init_vllm_registered_model(
            vllm_config,
            hf_config=config.text_config,
            architectures=[architecture_of(config.text_config.model_type)],
            prefix=maybe_prefix(prefix, "backbone"),
        )
        self.relay = config.channel_class(config)
        self.step: StepPlan | None = None
        self.hidden: Tensor | None = None

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """(T,) -> (T, D)."""
        return self.backbone.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The raw outputs of the backbone, (T, D): in a token-shift model, entry i speaks about position i + 1."""
        # `prepare_inputs` makes the embeddings of every step.
        ids = input_ids if inputs_embeds is None else None
        return self.backbone(ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Keeps the (n, D) outputs that the step asked for; the sampler makes logits of some, a piece at a time.

        vLLM gets none, (0, D), to which it could apply a grammar. Where it only measures memory it gets logits, (n, V).
        """
        if self.step is None:
            return self.logits_of(hidden_states)
        self.hidden = hidden_states
        return hidden_states[:0]

    def logits_of(self, head_inputs: Tensor) -> Tensor:
        """(n, D) -> (n, V) fp32, the same in all processes of tensor parallelism; n is at least 1."""
        return self.backbone.compute_logits(head_inputs)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads a checkpoint, whose names are those of the backbone; returns the names of what needs no more loading.

        The weights of a channel may be missing: it is a fresh one then, as in `from_pretrained`.
        """
        channel = dict(self.relay.named_parameters())
        of_backbone = []
        for name, tensor in weights:
            if name.startswith(CHANNEL):
                channel[name.removeprefix(CHANNEL)].data.copy_(tensor)
            else:
                of_backbone.append((name, tensor))
        loaded = {f"backbone.{name}" for name in self.backbone.load_weights(of_backbone)}
        return loaded | {f"{CHANNEL}{name}" for name in channel}


def architecture_of(model_type: str) -> str:
    """The name of vLLM's class for a causal decoder, as transformers calls it.

    Raises:
        ValueError: vLLM has none.
    """
    from vllm import ModelRegistry

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if name not in ModelRegistry.get_supported_archs():
        raise ValueError(
            f"The backbone `{model_type}` is not known to vLLM as a causal decoder: serve with `relay-hf serve`."
        )
    return name
