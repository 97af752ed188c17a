"""What would make a repository useless to others, found before anything is sent."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import GenerationConfig

from ..loading.checkpoint import load_config
from ..loading.tokenizer import load_tokenizer
from ..modeling import RelayConfig
from ..modeling.loading_files_relay import check_json_files, explained
from .contents import ADAPTER_CONFIG, CONFIG, WEIGHTS, matches

INDEX = "model.safetensors.index.json"
# What an adapter's base must share with the model that it was trained in.
SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


def check_contents(folder: Path) -> None:
    """Reads everything in the folder once, as a user would.

    Raises:
        ValueError: the configuration is not that of a relay model, weights are missing or not finite, or the tokenizer
            is another model's.
    """
    check_json_files(folder)
    model_type = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    if model_type != RelayConfig.model_type:
        raise ValueError(f"`config.json` is of a `{model_type}`, not of a relay model: run `relay-hf convert` first.")
    config = load_config(folder)
    if (folder / "generation_config.json").exists():
        GenerationConfig.from_pretrained(folder)
    with explained(folder, "weights"):
        _check_weights(folder)
    with explained(folder, "tokenizer"):
        _check_tokenizer(folder, config)


def check_base(config: RelayConfig, base: str, token: str | None) -> None:
    """Raise if an adapter's base is not on the Hub, or has another shape.

    Raises:
        ValueError: the base is missing, cannot be read with this token, or is another model.
    """
    try:
        theirs = RelayConfig.from_pretrained(base, token=token).text_config
    except OSError as error:
        raise ValueError(
            f"The adapter's base `{base}` cannot be read from the Hub: push it first, or name another as `base_model`."
        ) from error
    for name in SHAPE:
        if getattr(theirs, name) != getattr(config.text_config, name):
            raise ValueError(
                f"The adapter belongs to a base with `{name}={getattr(config.text_config, name)}`, but `{base}` has "
                f"{getattr(theirs, name)}: name the right one as `base_model`."
            )


def _check_weights(folder: Path) -> None:
    files = [path for path in sorted(folder.iterdir()) if matches(path.name, WEIGHTS)]
    named = ["adapter_model.safetensors"] if (folder / ADAPTER_CONFIG).exists() else []
    if (folder / INDEX).exists():
        named += json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    missing = sorted(set(named or ["model.safetensors"]) - {path.name for path in files})
    if missing:
        raise ValueError(f"The weights in {missing} are missing: save the model again, in the safetensors format.")
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no dictionary
                if not torch.isfinite(tensors.get_tensor(name)).all():
                    raise ValueError(f"`{name}` in `{path.name}` is not finite: push an earlier checkpoint.")


def _check_tokenizer(folder: Path, config: RelayConfig) -> None:
    tokenizer = load_tokenizer(str(folder), config)
    if tokenizer is None:
        return
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, the model {config.text_config.vocab_size}: push the tokenizer "
            "that the model was trained with."
        )
    # Converted models may use an id that their tokenizer has no name for.
    if tokenizer.mask_token_id not in (None, config.mask_token_id):
        raise ValueError(
            f"The tokenizer's [MASK] is {tokenizer.mask_token_id}, the model's {config.mask_token_id}: push the "
            "tokenizer that the model was trained with."
        )
