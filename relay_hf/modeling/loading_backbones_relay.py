"""What a transformer must offer to be the backbone of a relay model, and what a given one lacks."""

import inspect
from collections.abc import Iterator

from torch import nn
from transformers import AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from .versions_relay import CACHE_ARGUMENT

NEEDED_FIELDS = ("vocab_size", "hidden_size", "num_hidden_layers")
NEEDED_ARGUMENTS = ("inputs_embeds", "attention_mask", "position_ids", CACHE_ARGUMENT)
# How families change what their head says; ours is a plain linear layer. Neutral are None and 1.
HEAD_FIELDS = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_multiplier",
    "softcap",
)


def check_backbone(config: PreTrainedConfig, model: PreTrainedModel | None = None) -> None:
    """Raise a ValueError that names everything that a backbone lacks for block diffusion.

    Args:
        config: the backbone's configuration.
        model: the backbone, if it has been built.

    Raises:
        ValueError: it lacks something.
    """
    gaps = list(_gaps_of_config(config)) + (list(_gaps_of_model(model)) if model is not None else [])
    if gaps:
        raise ValueError(f"The backbone `{config.model_type}` is not supported: {'; '.join(gaps)}.")


def check_attention(name: str | None) -> None:
    """Refuses an implementation of attention that would not be shown the pattern of block diffusion.

    Args:
        name: as `attn_implementation` takes it; None = transformers' choice.

    Raises:
        ValueError: transformers makes no mask for it (a function that was registered without a mask function), or one
            of padding only (flash attention).
    """
    if name is not None and AttentionMaskInterface().get(name) in (None, flash_attention_mask):
        raise ValueError(
            f"`attn_implementation={name!r}` is not given a mask by transformers, so it could not follow the pattern "
            "of block diffusion: use 'sdpa', 'eager' or 'flex_attention', or register a function for its masks with "
            "`transformers.AttentionMaskInterface.register`."
        )


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions a backbone has a row for in a table of learned ones; None without such a table."""
    limit = getattr(model.config, "max_position_embeddings", None)
    embeddings = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not embeddings]
    # OPT's table begins with two rows that no position uses.
    return limit if limit and any(0 <= table.num_embeddings - limit <= 2 for table in tables) else None


def embedding_name(model: PreTrainedModel) -> str:
    """Name of the input embeddings inside the backbone, e.g. `embed_tokens`."""
    embeddings = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embeddings)


def _gaps_of_config(config: PreTrainedConfig) -> Iterator[str]:
    if config.is_encoder_decoder:
        yield "it is an encoder-decoder, but a backbone reads one sequence (choose a decoder)"
        return
    if config.get_text_config() is not config:
        yield "its configuration describes several models (pass that of its text model, `config.get_text_config()`)"
        return
    if missing := [name for name in NEEDED_FIELDS if not hasattr(config, name)]:
        yield f"its configuration has no {missing} (choose a decoder of text)"
        return
    # What a `DynamicCache` of the backbone would hold; it also knows layers that only `sliding_window` describes.
    if other := sorted(set(get_layer_types_and_kwargs(config)[0]) - {"full_attention"}):
        yield (
            f"it has layers of type {other}, which block diffusion does not support yet (choose one whose layers are "
            "all `full_attention`)"
        )
    scales = {name: value for name in HEAD_FIELDS if (value := getattr(config, name, None)) not in (None, 1)}
    if scales:
        yield f"its head changes the logits by {scales}, but ours is a plain linear layer (choose one without)"


def _gaps_of_model(model: PreTrainedModel) -> Iterator[str]:
    if not any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()):
        yield "its layers are no `GradientCheckpointingLayer`s, which are where a mask enters attention"
    if not model._supports_attention_backend:
        # Measured for CodeGen, Falcon, StableLM, MPT and, before transformers 5.24, GPT-J: causal as soon as no mask is
        # given, without an error.
        yield "its attention does not use transformers' attention interface, so it could stay causal inside a block"
    arguments = inspect.signature(type(model).forward).parameters
    if missing := [name for name in NEEDED_ARGUMENTS if name not in arguments]:
        yield f"its `forward` does not take {missing}"
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    if not isinstance(embeddings, nn.Embedding):
        yield "it names no input embeddings (`get_input_embeddings`)"
    elif embeddings.embedding_dim != model.config.hidden_size:
        yield (
            f"its embeddings are {embeddings.embedding_dim} wide and its layers {model.config.hidden_size}, but the "
            "channel adds one to the other"
        )
