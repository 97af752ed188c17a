"""Load model and tokenizer by path or Hub id; every failure is a one-sentence `OSError` or `ValueError`."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..modeling import RelayConfig, RelayForMaskedDiffusion
from ..modeling.generation_options_relay import DecodingOptions, complete_generation_config
from ..modeling.loading_files_relay import check_json_files, explained
from ..startup.one_line import one_line
from .gguf_sources import refuse_gguf
from .tokenizer import load_tokenizer


def read_config(source: str, revision: str | None = None, **options: Any) -> RelayConfig:
    """The configuration of a checkpoint, of whatever family, as ours.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        options: arguments of `RelayConfig` that are to differ from the checkpoint's.

    Raises:
        OSError: the checkpoint has no readable configuration.
        ValueError: it cannot become a relay model, must be converted first, or does not fit an option.
    """
    refuse_gguf(source)
    check_json_files(source)
    reason = ""
    try:
        fields, _ = RelayConfig.get_config_dict(source, revision=revision)
    except OSError as error:
        fields, reason = {}, f" ({one_line(error).rstrip('.')})"
    if not fields and (Path(source) / "adapter_config.json").is_file():
        raise ValueError(
            f"`{source}` holds adapters, not a model: give the folder with the merged model (`relay-hf train` writes "
            "it to `merged` inside), or merge them with `merge_and_unload` of PEFT."
        )
    if not fields:
        raise OSError(
            f"`{source}` is not a model{reason}: give a folder that holds a `config.json`, or the id of a repository "
            "that can be reached."
        )
    return load_config(source, revision=revision, **options)


def load_config(source: Any, **options: Any) -> RelayConfig:
    """`RelayConfig.from_pretrained`, with errors of one sentence.

    Args:
        source: folder or Hub id.
        options: arguments of `from_pretrained`, and fields of `RelayConfig` that are to differ from the checkpoint's.

    Raises:
        OSError: the configuration cannot be read.
        ValueError: a field has a value that `RelayConfig` does not take.
    """
    with explained(source, "configuration"):
        try:
            return RelayConfig.from_pretrained(source, **options)
        except StrictDataclassFieldValidationError as error:
            raise ValueError(f"{error.__cause__}: change the argument, or the field in `config.json`.") from error


def read_diffusion_config(source: str, revision: str | None = None, **options: Any) -> RelayConfig:
    """As `read_config`, for a masked diffusion model.

    Raises:
        OSError, ValueError: as `read_config`; or the checkpoint is no masked diffusion model.
    """
    config = read_config(source, revision, **options)
    if config.mask_token_id is None:
        raise ValueError(
            f"`{source}` is not a masked diffusion model, its configuration names no [MASK]: make one of a decoder "
            "with `relay-hf convert`, or train one with `mask_token_id`."
        )
    return config


def read_tokenizer(source: str, config: RelayConfig, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Args:
        source: folder or Hub id.
        config: the checkpoint's configuration.
        revision: branch, tag or commit on the Hub.

    Raises:
        OSError: the checkpoint has no tokenizer that can be loaded.
    """
    problem = f"`{source}` has no tokenizer that can be loaded: save it there with `tokenizer.save_pretrained`."
    try:
        tokenizer = load_tokenizer(source, config, revision)
    except OSError as error:
        raise OSError(problem) from error
    if tokenizer is None:
        raise OSError(problem)
    return tokenizer


def read_generation_config(source: str, config: RelayConfig, revision: str | None = None) -> Any:
    """The decoding defaults of a checkpoint: a `GenerationConfig` that has our fields, too.

    Args:
        source: folder or Hub id.
        config: the checkpoint's configuration.
        revision: branch, tag or commit on the Hub.
    """
    try:
        defaults = GenerationConfig.from_pretrained(source, revision=revision)
    except OSError:  # it has none
        defaults = GenerationConfig()
    complete_generation_config(config, defaults)
    return defaults


def check_decoding(config: RelayConfig, defaults: GenerationConfig, given: Mapping[str, Any]) -> None:
    """Raise if `generate` would refuse options, for instance before the weights are read.

    Args:
        config: the checkpoint's configuration.
        defaults: its generation config.
        given: keyword arguments of `generate`.

    Raises:
        ValueError: an option has a wrong type, is out of range, or has no effect beside the others.
    """
    options = copy.deepcopy(defaults)
    if unknown := options.update(**given):
        raise ValueError(f"`generate` does not take {sorted(unknown)}: check the spelling.")
    DecodingOptions.of(config, options)


def load_for_decoding(
    source: str,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    options: Callable[[GenerationConfig], Mapping[str, Any]] | None = None,
) -> tuple[Any, Any]:
    """Loads a `RelayForMaskedDiffusion` in evaluation mode, and its tokenizer.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        device: name of a torch device; "auto" takes an accelerator if the machine has one.
        dtype: dtype of the weights; "auto" is the dtype of the checkpoint.
        options: makes the keyword arguments of `generate` from the model's defaults; they are checked before the
            weights are read.

    Raises:
        OSError: the model or its tokenizer cannot be read.
        ValueError: the model is no relay model, or a device, dtype or option is unknown.
    """
    place = find_device(device)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`dtype={dtype}` is unknown: give float32, bfloat16, float16 or auto.")
    config = read_diffusion_config(source, revision)
    if options is not None:
        defaults = read_generation_config(source, config, revision)
        check_decoding(config, defaults, options(defaults))
    tokenizer = read_tokenizer(source, config, revision)
    model: Any = RelayForMaskedDiffusion.from_pretrained(source, revision=revision, dtype=dtype)
    return model.to(place).eval(), tokenizer


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is an accelerator if the machine has one.

    Raises:
        ValueError: the device is unknown, or not on this machine.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device={name}` is unknown: give for instance cpu, cuda:0 or auto.") from error
    if device.type not in ("cpu", accelerator.type if accelerator else "cpu"):
        raise ValueError(f"`device={name}` is not available here: give cpu, or auto for the best device.")
    return device
