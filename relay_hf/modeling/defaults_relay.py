"""What `generate` does if nothing is said: the defaults of block diffusion, and those of a checkpoint's family."""

from transformers import GenerationConfig

from .configuration_relay import RelayConfig
from .conversion_relay import foreign_generation_to_relay


def add_defaults(config: RelayConfig, options: GenerationConfig) -> None:
    """Gives a generation config the fields of block diffusion that it lacks, so that `generate` knows them.

    What another family's file says is translated first.

    Args:
        config: the model's.
        options: the model's generation config; changed in place.

    Raises:
        ValueError: the configuration's own defaults are not options of block diffusion.
    """
    for name, value in foreign_generation_to_relay(options.to_dict()).items():
        if value is not None or hasattr(GenerationConfig(), name):
            setattr(options, name, value)
        elif hasattr(options, name):
            delattr(options, name)
    block_size, own = config.block_size, dict(config.generation_defaults or {})
    if "confidence_top_k" in own:
        # Dream's sampler reads `top_k` in greedy decoding as well.
        own["confidence_top_k"] = options.top_k or own["confidence_top_k"]
    defaults = {
        "unmasking_policy": "confidence_threshold" if block_size else "confidence_budget",
        "unmasking_threshold": 0.85 if block_size else 0.15,
        "sub_block_size": 8 if block_size and block_size % 8 == 0 else None,
        "denoising_steps": None,
        "unmasking_order": "confidence",
        "confidence_top_k": None,
        "use_sub_block_cache": False,
        "fuse_commits": False,
        "use_relay": True,
        "relay_start": None,
        "t_max": None,
        "t_min": None,
        "sampling_seeds": None,
        "output_history": False,
    }
    if unknown := sorted(own.keys() - defaults.keys()):
        raise ValueError(f"`generation_defaults` name {unknown}: give options of block diffusion, {sorted(defaults)}.")
    for name, value in {**defaults, **own}.items():
        if not hasattr(options, name):
            setattr(options, name, value)
    if options.do_sample is None:
        # Pipelines draw tokens unless a model says that it does not.
        options.do_sample = False
    # Else transformers would not read our fields back from `generation_config.json`.
    options._from_model_config = False
