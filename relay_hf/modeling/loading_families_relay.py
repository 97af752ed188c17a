"""Reading checkpoints that were not written by this library: their configuration and their parameter names.

| family | `model_type` | backbone | attention | token shift |
|---|---|---|---|---|
| causal decoder | any of transformers | itself | blocks of 32 | yes |
| Fast-dLLM v2, with or without a relay | `Fast_dLLM_Qwen` | Qwen2 | blocks of 32 | yes |
| SDAR (arXiv 2510.06303) | `sdar` | Qwen3 | blocks | no |
| LLaDA (arXiv 2502.09992) | `llada` | Llama | whole sequence | no |
| Dream (arXiv 2508.15487) | `Dream` | Qwen2 | whole sequence | yes |
"""

from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

# Regular expressions for `from_pretrained`; each starts with a prefix that only its own family has.
FOREIGN_PARAMETER_NAMES = {
    # Published relay checkpoints; the second name is older.
    r"^model\.relay_layer_norm\.": "relay.norm.",
    r"^model\.h_t_layer_norm\.": "relay.norm.",
    # LLaDA, which inherited them from OLMo. Its `ff_proj` goes through the activation: that is Llama's gate.
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    **{
        rf"^model\.transformer\.blocks\.(\d+)\.{theirs}\.": rf"model.layers.\1.{ours}."
        for theirs, ours in {
            "attn_norm": "input_layernorm",
            "ff_norm": "post_attention_layernorm",
            "q_proj": "self_attn.q_proj",
            "k_proj": "self_attn.k_proj",
            "v_proj": "self_attn.v_proj",
            "attn_out": "self_attn.o_proj",
            "ff_proj": "mlp.gate_proj",
            "up_proj": "mlp.up_proj",
            "ff_out": "mlp.down_proj",
        }.items()
    },
}

# Describe the file rather than the backbone; `use_cache` false would forbid what block diffusion decodes with.
_BOOKKEEPING = ("architectures", "auto_map", "transformers_version", "model_type", "torch_dtype", "dtype", "use_cache")
_FAST_DLLM_FIELDS = ("bd_size", "mask_token_id", "use_relay", "relay_layer", "use_loopholing", "loophole_layer")

# Variants of LLaDA's code that a Llama cannot express, with the only value that it can.
_LLADA_FIXED = {
    "block_type": "llama",
    "block_group_size": 1,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "scale_logits": False,
}
# Fields of Dream's generation config that have no meaning here, or another name.
_DREAM_FIELDS = {"alg", "alg_temp", "eps", "steps", "mask_token_id", "generation_kwargs", "output_history", "top_k"}
_DREAM_ORDERS = {"maskgit_plus": "confidence", "entropy": "entropy", "topk_margin": "margin"}
_LLADA_KEPT = ("rms_norm_eps", "rope_theta", "attention_dropout")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def foreign_config_to_relay(config: dict[str, Any]) -> dict[str, Any]:
    """Translates the `config.json` of another model family into arguments of `RelayConfig`.

    A causal decoder becomes a token-shift model with a fresh channel, and so do SDAR, LLaDA and Dream with their own
    attention pattern.

    Args:
        config: the dictionary in the file.

    Returns:
        Arguments for `RelayConfig`.

    Raises:
        ValueError: the file names no model type, or one that cannot be read.
    """
    model_type = config.get("model_type")
    if model_type is None:
        raise ValueError("The checkpoint's config.json has no `model_type`: add the one of its backbone, e.g. 'qwen2'.")
    translate = _FAMILIES.get(model_type, _causal_decoder)
    # `torch_dtype` is the older name.
    return {"dtype": config.get("dtype", config.get("torch_dtype")), **translate(config)}


def _causal_decoder(config: dict[str, Any]) -> dict[str, Any]:
    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"`model_type={model_type!r}` is known neither to transformers nor to this library: load a decoder of "
            f"transformers, or one of {sorted(_FAMILIES)}."
        )
    return {
        "token_shift": True,
        "mask_token_id": config.get("mask_token_id"),
        "text_config": _without(config, (*_BOOKKEEPING, "mask_token_id")) | {"model_type": model_type},
    }


def code_of_its_own(config: dict[str, Any]) -> str | None:
    """The model's code that a causal decoder's `config.json` names in place of transformers'; None if it names none.

    Such code often attends in both directions, which its `model_type` does not say.
    """
    if config.get("model_type") in _FAMILIES:
        return None
    named = [code for name, code in (config.get("auto_map") or {}).items() if name.startswith("AutoModel")]
    return str(named[0]) if named else None


def _fast_dllm(config: dict[str, Any]) -> dict[str, Any]:
    trained = config.get("use_relay", config.get("use_loopholing"))
    layer = config.get("relay_layer", config.get("loophole_layer", -1))
    return {
        "text_config": _without(config, _BOOKKEEPING + _FAST_DLLM_FIELDS) | {"model_type": "qwen2"},
        "block_size": config.get("bd_size", 32),
        "mask_token_id": config.get("mask_token_id", 151665),
        "token_shift": True,
        "relay_channel": "none" if trained is False else "layer_norm",
        "relay_layer": layer,
        # Only exactly -1 is read behind the final norm: the last layer by its positive index is not.
        "relay_readout": "post_norm" if layer == -1 else "pre_norm",
        # A published channel never saw a state in the first step of a block; a fresh one has no such history.
        "relay_initial_state": "none" if trained else "zeros",
        "relay_norm_eps": config.get("rms_norm_eps", 1e-6),
    }


def _sdar(config: dict[str, Any]) -> dict[str, Any]:
    fields = _without(config, (*_BOOKKEEPING, "block_size", "mask_token_id", "fuse_cross_entropy", "debug"))
    return {
        # Its own class, a Qwen3, always writes `head_dim`: a file without one describes a Qwen2.
        "text_config": fields | {"model_type": "qwen3" if "head_dim" in config else "qwen2"},
        # What its own script decodes with if the file does not say.
        "block_size": config.get("block_size", 4),
        "mask_token_id": config.get("mask_token_id", 151669),
        "token_shift": False,
        "generation_defaults": {"sub_block_size": None},
    }


def _dream(config: dict[str, Any]) -> dict[str, Any]:
    if "block_size" in config:
        raise ValueError(
            f"This Dream checkpoint has `block_size={config['block_size']}`, but only the whole-sequence model is "
            "known: load a checkpoint of Dream v0."
        )
    if config.get("use_mrope"):
        raise ValueError("This Dream checkpoint has `use_mrope`, which Qwen2 lacks: load one of text only.")
    return {
        "text_config": _without(config, (*_BOOKKEEPING, "mask_token_id", "use_mrope", "top_k"))
        | {"model_type": "qwen2"},
        "block_size": None,
        "mask_token_id": config.get("mask_token_id", 151666),
        "token_shift": True,
        "generation_defaults": {"confidence_top_k": config.get("top_k")},
    }


def foreign_generation_to_relay(options: dict[str, Any]) -> dict[str, Any]:
    """Translates what the generation configs of other families say: options of `generate`, None for what goes.

    Dream: `alg` and `steps` are a `time_schedule`, in the order of `alg` ("origin", a random order, is not among ours);
    a `temperature` of 0 is greedy decoding; `top_k` counts there as well. Its other fields describe its own sampler.

    Args:
        options: the fields of a `generation_config.json`.

    Returns:
        Fields to set, and those to remove with the value None.
    """
    if not {"alg", "alg_temp"} & options.keys():
        return {}
    known: dict[str, Any] = dict.fromkeys(_DREAM_FIELDS & options.keys())
    temperature = options.get("temperature")
    known |= {"do_sample": bool(temperature), "temperature": temperature or None}
    known |= {"confidence_top_k": options.get("top_k")}
    if (order := _DREAM_ORDERS.get(str(options.get("alg")))) is not None and options.get("steps"):
        known |= {"unmasking_policy": "time_schedule", "unmasking_order": order, "denoising_steps": options["steps"]}
    return known


def _llada(config: dict[str, Any]) -> dict[str, Any]:
    if "d_model" not in config:
        raise ValueError(
            "This LLaDA checkpoint has no `d_model`, so it is not of the dense 8B family (LLaDA, LLaDA 1.5): other "
            "LLaDAs are not supported yet."
        )
    others = {name: config[name] for name, value in _LLADA_FIXED.items() if config.get(name, value) != value}
    if config.get("bias_for_layer_norm"):
        others["bias_for_layer_norm"] = True
    if others:
        raise ValueError(f"This LLaDA checkpoint is no Llama, because of {others}: load one like LLaDA-8B.")
    heads = config["n_heads"]
    text_config = {
        "model_type": "llama",
        # Rows of the embedding, which may be padded beyond the tokens in use.
        "vocab_size": config.get("embedding_size") or config["vocab_size"],
        "hidden_size": config["d_model"],
        "intermediate_size": config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads),
        "max_position_embeddings": config["max_sequence_length"],
        "initializer_range": config.get("init_std", 0.02),
        "tie_word_embeddings": bool(config.get("weight_tying")),
        **{name: config[name] for name in _LLADA_KEPT if name in config},
        # What the file does not name is none, rather than Llama's own.
        **{name: config.get(name) for name in _TOKENS},
    }
    return {
        "text_config": text_config,
        "block_size": None,
        "mask_token_id": config.get("mask_token_id", 126336),
        "token_shift": False,
    }


_FAMILIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "Fast_dLLM_Qwen": _fast_dllm,
    "sdar": _sdar,
    "llada": _llada,
    "Dream": _dream,
}


def _without(config: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def check_whole(source: Any, config: Any, missing: list[str], options: dict[str, Any]) -> None:
    """Raise an error if a part of a checkpoint is missing.

    A channel may be, if the checkpoint does not claim to have it, and so may the head of a backbone that was saved
    alone.

    Args:
        source: folder or Hub id.
        config: the `RelayConfig` that was loaded.
        missing: names of parameters that the files do not have.
        options: the arguments of `from_pretrained`.

    Raises:
        ValueError: a part is missing.
    """
    if not missing:
        return
    own = _own_fields(source, options)
    is_relay = own.get("model_type") == config.model_type
    has_channel = is_relay and own.get("relay_channel", type(config).relay_channel) == config.relay_channel
    has_channel = has_channel or bool(own.get("use_relay") or own.get("use_loopholing"))
    allowed = (() if has_channel else ("relay.",)) + (() if is_relay else ("lm_head.",))
    if all(name.startswith(allowed) for name in missing):
        return
    shown = ", ".join(f"`{name}`" for name in missing[:3]) + (" and others" if len(missing) > 3 else "")
    raise ValueError(f"`{source}` is not whole, it lacks {len(missing)} weights ({shown}): save or download it again.")


def _own_fields(source: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's own `config.json` says."""
    names = ("revision", "subfolder", "cache_dir", "force_download", "local_files_only", "proxies", "token")
    place: dict[str, Any] = {name: options[name] for name in names if name in options}
    return PreTrainedConfig.get_config_dict(source, **place)[0] if source is not None else {}
