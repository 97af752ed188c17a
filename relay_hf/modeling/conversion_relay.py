"""Reading checkpoints that were not written by this library: their configuration and their parameter names."""

from typing import Any

# Names of the published checkpoints (the second one is older), as regular expressions for `from_pretrained`.
FOREIGN_PARAMETER_NAMES = {
    r"^model\.relay_layer_norm\.": "relay.norm.",
    r"^model\.h_t_layer_norm\.": "relay.norm.",
}

FAST_DLLM_MODEL_TYPE = "Fast_dLLM_Qwen"
FAST_DLLM_MASK_TOKEN_ID = 151665

# Describe the file rather than the backbone.
_BOOKKEEPING = ("architectures", "auto_map", "transformers_version", "model_type", "torch_dtype", "dtype")
_FAST_DLLM_FIELDS = ("bd_size", "mask_token_id", "use_relay", "relay_layer", "use_loopholing", "loophole_layer")


def foreign_config_to_relay(config: dict[str, Any]) -> dict[str, Any]:
    """Translates the `config.json` of another model family into arguments of `RelayConfig`.

    Known are Fast-dLLM v2 (`model_type: Fast_dLLM_Qwen`) with or without a relay, under the current and the older field
    names, and every causal decoder of transformers, which becomes a token-shift model with a fresh channel.

    Args:
        config: the dictionary in the file.

    Returns:
        Arguments for `RelayConfig`.

    Raises:
        ValueError: the file names no model type.
    """
    model_type = config.get("model_type")
    if model_type is None:
        raise ValueError("The checkpoint's config.json has no `model_type`: add the one of its backbone, e.g. 'qwen2'.")
    # `torch_dtype` is the older name.
    common = {"dtype": config.get("dtype", config.get("torch_dtype")), "token_shift": True}
    if model_type != FAST_DLLM_MODEL_TYPE:
        return {**common, "text_config": _without(config, _BOOKKEEPING) | {"model_type": model_type}}

    trained = config.get("use_relay", config.get("use_loopholing"))
    layer = config.get("relay_layer", config.get("loophole_layer", -1))
    return {
        **common,
        "text_config": _without(config, _BOOKKEEPING + _FAST_DLLM_FIELDS) | {"model_type": "qwen2"},
        "block_size": config.get("bd_size", 32),
        "mask_token_id": config.get("mask_token_id", FAST_DLLM_MASK_TOKEN_ID),
        "relay_channel": "none" if trained is False else "layer_norm",
        "relay_layer": layer,
        # Only exactly -1 is read behind the final norm: the last layer by its positive index is not.
        "relay_readout": "post_norm" if layer == -1 else "pre_norm",
        # A published channel never saw a state in the first step of a block; a fresh one has no such history.
        "relay_initial_state": "none" if trained else "zeros",
        "relay_norm_eps": config.get("rms_norm_eps", 1e-6),
    }


def _without(config: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}
