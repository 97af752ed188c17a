"""What a card says of a model from its configuration alone. Nothing here imports torch."""

from typing import TYPE_CHECKING

from .card_data import RelayCardData
from .citations import FAST_DLLM_V2_CITATION, RELAY_CITATION

if TYPE_CHECKING:
    from ..modeling import RelayConfig


def describe_model(config: "RelayConfig") -> dict[str, str]:
    """Name -> value: the backbone, what is denoised together, the channel."""
    text = config.text_config
    shift = "token shift (the raw head scores the next token)" if config.token_shift else "no token shift"
    size = config.block_size
    denoises = "the whole sequence at once" if size is None else f"blocks of {size} position{'s' if size > 1 else ''}"
    fields = {
        "layers": "num_hidden_layers",
        "hidden size": "hidden_size",
        "vocabulary": "vocab_size",
        "positions": "max_position_embeddings",
    }
    sizes = [f"{name} {value:,}" for name, field in fields.items() if (value := getattr(text, field, None)) is not None]
    return {
        "Backbone": ", ".join([f"`{text.model_type}`", *sizes]),
        "Denoises": f"{denoises}, {shift}",
        "Channel": f"`{config.relay_channel}`{_origin_of_channel(config)}",
        "[MASK]": f"token {config.mask_token_id}",
    }


def _origin_of_channel(config: "RelayConfig") -> str:
    """What a reader has to import to load the model; "" for channels that travel with the configuration."""
    module = config.channel_class.__module__
    is_ours = module.rpartition(".")[0] == type(config).__module__.rpartition(".")[0]
    return "" if is_ours else f", which is registered by `import {module}`: import it before loading the model"


def describe_channel(config: "RelayConfig") -> str | None:
    """What is carried between two denoising steps, and how it enters; None = nothing is."""
    return config.channel_class.sentence(config) or None


def cite_model(config: "RelayConfig") -> list[str]:
    """BibTeX of Relay, and of whatever else the model is made of."""
    is_block_diffusion = config.block_size is not None and config.token_shift
    of_blocks = [FAST_DLLM_V2_CITATION] if is_block_diffusion else []
    return [RELAY_CITATION, *filter(None, [config.channel_class.citation]), *of_blocks]


def plain_card(name: str, config: "RelayConfig", usage: str = "", base_model: str | None = None) -> RelayCardData:
    """The card of a model that comes without one.

    Args:
        name, config: the model's name and configuration.
        usage: code, for instance of `usage_snippet`.
        base_model: the base of an adapter.
    """
    return RelayCardData(
        name=name,
        base_model=base_model,
        channel=describe_channel(config),
        model=describe_model(config),
        usage=usage,
        limits=["Nothing is known of its training."],
        pipeline_tag="text-generation" if config.block_size is not None else None,
        citations=cite_model(config),
    )
