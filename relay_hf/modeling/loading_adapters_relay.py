"""Adapters (LoRA and the like) whose repository says which relay model they belong to.

An adapter's own file names a base and nothing else, so a loader would make a plain decoder of it. The `config.json`
that `push` and the trainer put beside an adapter is that of the relay model, and names the base in one more field.
"""

import copy
import importlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    cached_file,
    find_adapter_config_file,
    is_peft_available,
)

# In `config.json` beside an adapter only; a configuration in memory never has it.
ADAPTER_BASE_FIELD = "base_model_name_or_path"

# Where a relay model keeps the PeftModel around it: outside of its modules, of which it would be its own grandchild.
_LOADED = "_loaded_adapter"
# These change the weights of the base when an adapter is made, each time otherwise, or by what only their maker has.
_UNREPEATABLE = ("pissa_niter_", "corda", "lora_ga", "loftq")
# What is wrong with some kinds of adapters.
_UNFIT = {
    "LN_TUNING": "leaves the channel behind when it is merged",
    "POLY": "asks for `task_ids`, which a denoising step does not have",
    "SHADOW": "looks for `hidden_size` in the configuration, which a relay model keeps in `text_config`",
    "XLORA": "mixes adapters by a second pass over the text",
}

# What `from_pretrained` takes about where and how to download.
_PLACE = ("revision", "subfolder")
_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# What a configuration would take for its own.
_OF_THE_MODEL = ("dtype", "torch_dtype")


def split_adapter(
    config_class: type[PreTrainedConfig], source: Any, options: dict[str, Any]
) -> tuple[Any, dict[str, Any], dict[str, Any] | None]:
    """Takes apart what `from_pretrained` was asked to load, if that is an adapter with a relay configuration.

    Args:
        config_class: `RelayConfig`; remote code has one of its own.
        source: folder or Hub id.
        options: the other arguments of `from_pretrained`.

    Returns:
        Where the base is, the arguments to load it with, and those of `load_adapter`. For anything but an adapter:
        `source`, `options` and None.

    Raises:
        ValueError: it is an adapter that names no base.
        ImportError: it is an adapter, and `peft` is not installed.
    """
    found = {name: options[name] for name in (*_PLACE, *_DOWNLOAD) if name in options}
    auto = options.get("adapter_kwargs") or {}
    if (adapter_config := find_adapter_config_file(source, **found)) is None:
        if "_adapter_model_path" not in auto:
            return source, options, None
        # The Auto classes went from an adapter without a configuration of its model to its base.
        rest = {name: value for name, value in options.items() if name not in ("adapter_kwargs", "adapter_name")}
        return source, rest, _adapter_arguments(source, options, found)
    config, rest = options.get("config"), {name: value for name, value in options.items() if name not in _PLACE}
    if not isinstance(config, PreTrainedConfig):
        if _own_file(source, CONFIG_NAME, found) is None:
            rest.pop("adapter_kwargs", None)
            adapter = _adapter_arguments(source, {**options, **rest}, found)
            rest.pop("adapter_name", None)
            return _base_of_peft(source, adapter_config), rest, adapter
        held = {name: options[name] for name in _OF_THE_MODEL if name in options}
        others = {name: value for name, value in options.items() if name not in held}
        config, rest = config_class.from_pretrained(source, return_unused_kwargs=True, **others)
        rest |= {**held, **{name: found[name] for name in _DOWNLOAD if name in found}}
    base = getattr(config, ADAPTER_BASE_FIELD, None)
    if not base:
        base = _base_of_peft(source, adapter_config)
    if not is_peft_available():
        raise ImportError(f"`{source}` holds an adapter of `{base}`, which needs peft: run `pip install peft`.")
    config = copy.deepcopy(config)
    # Else a merged model would be saved with it, and be taken for an adapter.
    delattr(config, ADAPTER_BASE_FIELD)
    rest["config"] = config
    if rest.get("generation_config") is None and _own_file(source, GENERATION_CONFIG_NAME, found) is not None:
        rest["generation_config"] = GenerationConfig.from_pretrained(source, **found)
    adapter = _adapter_arguments(source, rest, found)
    for name in ("adapter_kwargs", "adapter_name"):
        rest.pop(name, None)
    return base, rest, adapter


def _adapter_arguments(source: Any, options: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `load_adapter`."""
    # The Auto classes followed the name in the adapter's file, and pass on where they came from: of a copied
    # repository, `source` is the original. `tests/hub/test_adapters.py` fails if they name it otherwise.
    place = {**found, **(options.get("adapter_kwargs") or {})}
    adapter = {"peft_model_id": place.pop("_adapter_model_path", source), "adapter_kwargs": place}
    return adapter | {name: options[name] for name in ("adapter_name",) if name in options}


def _base_of_peft(source: Any, adapter_config: str) -> str:
    """The base that PEFT noted in an adapter's own file."""
    base = json.loads(Path(adapter_config).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base or str(base) == str(source):
        raise ValueError(
            f"`{source}` holds an adapter that names no base, because its model had not been saved: save the base with "
            f"`save_pretrained`, load it from there, and put the adapter on it with `load_adapter({str(source)!r})`."
        )
    return base


def _own_file(source: Any, name: str, found: dict[str, Any]) -> str | None:
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **found)


def check_adapter(config: Any) -> None:
    """Raise a ValueError for a kind of adapter that cannot work here.

    Args:
        config: the `PeftConfig`.

    Raises:
        ValueError: it learns prompts, cannot hold the channel, or would be another adapter once it is loaded.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"`peft_type={kind!r}` learns a prompt in front of the text, which shifts the blocks that are denoised: "
            "choose an adapter of weights, `LoraConfig` for instance."
        )
    if reason := _UNFIT.get(kind):
        raise ValueError(f"`peft_type={kind!r}` {reason}: choose another adapter, `LoraConfig` for instance.")
    if not any(field.name == "modules_to_save" for field in fields(config)):
        raise ValueError(
            f"`peft_type={kind!r}` has no `modules_to_save`, in which the channel is trained and saved: choose another "
            "adapter, `LoraConfig(trainable_token_indices=...)` for instance."
        )
    for name in ("layer_replication", "alora_invocation_tokens"):
        if getattr(config, name, None):
            raise ValueError(f"`{name}` changes what a pass over a block is: leave it out.")
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.startswith(_UNREPEATABLE):
        raise ValueError(
            f"`init_lora_weights={start!r}` changes the base in a way that loading the adapter cannot repeat: choose "
            "'pissa', 'olora' or True."
        )


def put_adapter(model: Any, source: Any, adapter_name: str, place: dict[str, Any]) -> Any:
    """Puts a saved adapter on a relay model, trainable; returns the PeftModel around it.

    Args:
        model: the relay model that it belongs to.
        source: folder or Hub id.
        adapter_name: what PEFT is to call it.
        place: arguments about where and how to download.

    Raises:
        ValueError: a part of the adapter is missing, has no place in the model or another size, or the kind of adapter
            cannot work here.
    """
    # By its name, or remote code would insist on it for models without adapters.
    peft = importlib.import_module("peft")
    place = {name: value for name, value in place.items() if value is not None}
    config = peft.PeftConfig.from_pretrained(source, **place)
    check_adapter(config)
    config.inference_mode = False
    classes = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    wrapped = classes.get(config.task_type, peft.PeftModel)(model, config, adapter_name)
    # Before loading: of a module that is saved whole, PEFT takes for granted that all parts are there.
    given = set(peft.load_peft_weights(source, device="cpu", **place))
    needed, known = (  # embeddings may be there
        set(peft.get_peft_model_state_dict(wrapped, adapter_name=adapter_name, save_embedding_layers=embeddings))
        for embeddings in (False, True)
    )
    for difference, keys in {"lacks": needed - given, "has, beside what belongs to it,": given - known}.items():
        if keys:
            raise ValueError(
                f"The adapter `{source}` {difference} {sorted(keys)}: save it again, or load it on the base that it "
                "was trained on."
            )
    try:
        wrapped.load_adapter(source, adapter_name, is_trainable=True, torch_device="cpu", **place)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The adapter `{source}` does not fit its base ({reason}): name the right base.") from error
    vars(model)[_LOADED] = wrapped
    return wrapped.eval()


def loaded_adapter(model: Any) -> Any:
    """The PeftModel around a relay model on which an adapter was loaded, or None."""
    return vars(model).get(_LOADED)


def merge_adapter(model: Any, **options: Any) -> Any:
    """The relay model with its loaded adapter put into the weights, as PEFT's `merge_and_unload` does it.

    Raises:
        ValueError: no adapter was loaded on it.
    """
    wrapped = vars(model).pop(_LOADED, None)
    if wrapped is None:
        raise ValueError("The model has no adapter that was loaded: there is nothing to merge.")
    return wrapped.merge_and_unload(**options)


def complete_adapter(model: Any, folder: str | Path) -> None:
    """Writes what PEFT leaves out into the folder of an adapter: the configuration of its relay model.

    Args:
        model: the relay model that the adapter is on.
        folder: where PEFT wrote; nothing happens if there is no adapter.
    """
    if (Path(folder) / "adapter_config.json").exists():
        config = copy.deepcopy(model.config)
        # Not what PEFT calls the base: of an adapter that was loaded from the Hub, that is its own repository.
        setattr(config, ADAPTER_BASE_FIELD, model.name_or_path or None)
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None and not quantizer.pre_quantized:
            # The base's files are whole: with this they would be taken for quantised ones.
            del config.quantization_config
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
