"""What vLLM has to know to serve a relay model, so that nobody need say it on the command line; and what is refused."""

import logging
from typing import Any

from .internals import MODELS_CONFIG_MAP, CUDAGraphMode, DiffusionConfig, VerifyAndUpdateConfig

logger = logging.getLogger(__name__)

ARCHITECTURE = "RelayForMaskedDiffusion"
CHANNELS = ("layer_norm", "none")
# Ways to spread a model that are not supported.
SINGLE = ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size")
# Kernels of attention take pages of a multiple of so many positions.
PAGE_UNIT = 32
# Of `generation_config.json`: vLLM would put them into every request, and then refuse it. `options` reads them.
READ_BY_US = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def register_model() -> None:
    """Enters model and defaults in vLLM's registries."""
    from vllm import ModelRegistry

    MODELS_CONFIG_MAP[ARCHITECTURE] = RelayDefaults
    # By name, so that the process that answers requests need not load the model's code.
    ModelRegistry.register_model(ARCHITECTURE, "relay_hf.vllm.model:RelayForVllm")


class RelayDefaults(VerifyAndUpdateConfig):
    """Sets vLLM's configuration for a relay model, in the process that makes it."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Changes the configuration in place.

        Raises:
            ValueError: the model, or an option of vLLM's, is not supported.
        """
        from .checks import name_of_checks, reader_of

        model, config = vllm_config.model_config, vllm_config.model_config.hf_config
        check_model(config)
        check_engine(vllm_config)
        source, revision = model.hf_config_path or model.model, model.revision
        reader_of(source, revision)  # raises if a default of the checkpoint is not supported
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=config.block_size)
        vllm_config.attention_config.use_non_causal = True
        model.logits_processors = [*(model.logits_processors or []), name_of_checks(source, revision)]
        model.override_generation_config.update(dict.fromkeys(READ_BY_US))
        # Thresholds are compared with probabilities, which logits of half precision move by several percent.
        config.text_config.head_dtype = getattr(config.text_config, "head_dtype", None) or "float32"
        _fit_lengths(vllm_config, config.block_size)
        _fit_pages(vllm_config.cache_config, config.block_size)
        _fit_scheduler(vllm_config.scheduler_config)
        compilation = vllm_config.compilation_config
        if compilation.cudagraph_mode == CUDAGraphMode.FULL:
            raise ValueError(
                "`cudagraph_mode=FULL` also captures batches with prompts, whose blocks differ from step to step: "
                "choose FULL_AND_PIECEWISE, FULL_DECODE_ONLY, PIECEWISE or NONE."
            )


def reads_before_block(config: Any) -> bool:
    """Whether a block's state needs the raw output at the position before it: that of its first position, which a
    token-shift model aligns with it, and which receives a state only if all positions do."""
    return bool(config.token_shift and config.relay_state_width and config.relay_scope == "all")


def check_model(config: Any) -> None:
    """Raise a ValueError if the plug-in cannot serve the model.

    Args:
        config: the model's `RelayConfig`.

    Raises:
        ValueError: it has no blocks or no [MASK], or carries anything but the hidden state behind the final norm.
    """
    if config.block_size is None:
        raise ValueError("`block_size=None` makes the text one canvas, which vLLM cannot extend: serve with relay-hf.")
    if config.relay_channel not in CHANNELS:
        raise ValueError(
            f"`relay_channel={config.relay_channel!r}` is not supported by vLLM, which knows {list(CHANNELS)}: serve "
            "with `relay-hf serve`."
        )
    if config.relay_channel != "none" and config.relay_readout != "post_norm":
        raise ValueError(
            f"`relay_readout={config.relay_readout!r}` reads a layer that backbones of vLLM do not return: serve with "
            "`relay-hf serve`."
        )
    if config.mask_token_id is None:
        raise ValueError("The checkpoint names no `mask_token_id`: make a relay model of it with `relay-hf convert`.")


def check_engine(vllm_config: Any) -> None:
    """Raise a ValueError if relay models cannot be served with other parts of vLLM's configuration.

    Args:
        vllm_config: configuration of vLLM.

    Raises:
        ValueError: the model is to be spread in a way that is not supported, another model is to draft for it, or vLLM
            would use its first model runner, which knows no models that denoise.
    """
    for name in SINGLE:
        if (count := getattr(vllm_config.parallel_config, name, 1)) > 1:
            raise ValueError(f"`{name}={count}` is not supported for relay models: use `tensor_parallel_size`.")
    if vllm_config.speculative_config is not None:
        raise ValueError("`speculative_config` drafts for models that go token by token: leave it out.")
    if not vllm_config.use_v2_model_runner:
        raise ValueError(
            "Relay models need vLLM's second model runner, and that Triton with a backend for this machine: leave out "
            "`VLLM_USE_V2_MODEL_RUNNER=0`, and on a CPU install triton-cpu."
        )


def _fit_lengths(vllm_config: Any, size: int) -> None:
    """Whole blocks only: the last one must end at or before the last position, and fit in a step."""
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    whole = model.max_model_len // size * size
    if whole == 0:
        raise ValueError(f"`max_model_len={model.max_model_len}` has no room for a block of {size}: raise it.")
    if whole < model.max_model_len:
        logger.warning("`max_model_len=%d` becomes %d, whole blocks of %d.", model.max_model_len, whole, size)
    model.max_model_len = scheduler.max_model_len = whole
    if scheduler.max_num_batched_tokens < size:
        raise ValueError(
            f"`max_num_batched_tokens={scheduler.max_num_batched_tokens}` has no room for a block of {size}: raise it."
        )


def _fit_pages(cache: Any, size: int) -> None:
    """Pages of whole blocks, which prefix caching needs (see `scheduler`), where every kernel takes them."""
    if not cache.user_specified_block_size and size % PAGE_UNIT == 0:
        cache.block_size, cache.user_specified_block_size = size, True


def _fit_scheduler(scheduler: Any) -> None:
    if scheduler.async_scheduling:
        raise ValueError(
            "`async_scheduling=True` plans a step before the one before it has ended, but a block that ends moves the "
            "next: leave it out."
        )
    scheduler.async_scheduling = False
    if scheduler.scheduler_cls is not None:
        raise ValueError(f"`scheduler_cls={scheduler.scheduler_cls}` knows no blocks: leave it out.")
    scheduler.scheduler_cls = "relay_hf.vllm.scheduler.RelayScheduler"
