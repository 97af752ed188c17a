"""GGUF files as sources: transformers unpacks their tensors and gives them the names that it knows.

Its loader fills whatever the file lacks with random numbers, drops what its model has no place for and does not read
how positions are scaled, so all that is looked for here.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.utils import cached_file, is_gguf_available

if TYPE_CHECKING:
    from gguf import GGUFReader  # an optional requirement


def open_gguf(source: str, gguf_file: str, revision: str | None) -> "GGUFReader":
    """Opens a file, without reading its tensors.

    Args:
        source: folder or Hub id.
        gguf_file: name of the file in it.
        revision: branch, tag or commit on the Hub.

    Raises:
        ImportError: the library `gguf` is not installed, or too old.
        ValueError: the file is damaged, or of another kind.
        OSError: the file does not exist.
    """
    if not is_gguf_available():
        raise ImportError(
            "GGUF files are read with the package `gguf`, which is missing or too old: `pip install 'relay-hf[gguf]'`."
        )
    from gguf import GGUFReader

    try:
        path = cached_file(source, gguf_file, revision=revision)
    except OSError as error:
        reason = "" if Path(source).is_dir() else f" ({' '.join(str(error).split()).rstrip('.')})"
        raise FileNotFoundError(f"`{source}` has no file `{gguf_file}`{reason}: check both names.") from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:  # whatever it stumbles over
        raise ValueError(f"`{path}` is no complete GGUF file ({error}): fetch it again, or give another.") from error


def read_gguf_weights(
    file: "GGUFReader", source: str, gguf_file: str, dtype: str | None, revision: str | None
) -> dict[str, Tensor]:
    """Reads the parameters of a causal decoder.

    Args:
        file: the result of `open_gguf`.
        source: folder or Hub id.
        gguf_file: name of the file in it.
        dtype: dtype to unpack to; by default float32.
        revision: branch, tag or commit on the Hub.

    Returns:
        The parameters under the names of transformers' model.

    Raises:
        ValueError: the model that transformers makes of the file is another: parameters are missing, left over or of
            other shapes, or its positions are not scaled as they should be.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        revision=revision,
        gguf_file=gguf_file,
        dtype=dtype or torch.float32,
        # Left packed, they would be bytes that only its own layers can multiply with.
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        # Refused below, with a sentence that says which.
        ignore_mismatched_sizes=True,
    )
    model, info = loaded
    if mismatched := sorted(info["mismatched_keys"]):
        name, in_file, in_model = mismatched[0]
        raise ValueError(
            f"`{gguf_file}` has `{name}` of shape {tuple(in_file)}, but transformers takes the file's description for "
            f"one of shape {tuple(in_model)}: convert its checkpoint in safetensors."
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"`{gguf_file}` lacks {len(missing)} parameters of a {model.config.model_type} model, e.g. "
            f"`{missing[0]}`: convert a complete file of one model."
        )
    surplus = sum(int(tensor.n_elements) for tensor in file.tensors) - model.num_parameters()
    if surplus > 0:
        raise ValueError(
            f"`{gguf_file}` holds {surplus} numbers more than a {model.config.model_type} model of transformers, which "
            "would compute something else: convert its checkpoint in safetensors."
        )
    fields = file.fields.items()
    scalings = {field.contents() for name, field in fields if name.endswith(".rope.scaling.type")} - {"none"}
    understood = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")
    if scalings and understood == "default":
        raise ValueError(
            f"`{gguf_file}` scales its rotary positions ({scalings.pop()}), which transformers does not read in GGUF "
            "files: convert its checkpoint in safetensors."
        )
    return model.state_dict()
