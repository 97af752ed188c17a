"""`convert`: a checkpoint of another model becomes a relay model in a folder of its own.

1. read the configuration and the tokenizer, choose [MASK]; 2. load the weights under our names and refuse what has no
place; 3. add the row of a new [MASK]; 4. write everything beside the output, and move it there when it is complete.
What is peculiar to GGUF files is in `gguf_file`.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..loading.checkpoint import load_config
from ..loading.tokenizer import load_tokenizer
from ..modeling import RelayConfig, RelayForMaskedDiffusion
from ..modeling.configuration_relay import RELAY_FIELDS
from ..modeling.loading_families_relay import FOREIGN_PARAMETER_NAMES, code_of_its_own
from ..modeling.loading_files_relay import check_json_files
from ..startup.one_line import one_line
from .gguf_file import open_gguf, read_gguf_weights
from .mask_token import add_rows, choose_mask_token
from .report import ConversionReport

END_OF_TURN = "<|eot_id|>"
# Buffers that older libraries saved; models compute them.
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$")


def convert(
    source: str | Path,
    output: str | Path,
    *,
    gguf_file: str | None = None,
    mask_token_id: int | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> ConversionReport:
    """Writes a relay model made from a causal decoder, Fast-dLLM v2, SDAR, LLaDA or Dream.

    Its forward pass is the source's own until the channel is trained, as a fresh channel changes nothing. Tokenizer,
    chat template, special tokens and generation defaults come along.

    Args:
        source: folder or Hub id of the checkpoint; or the path of a GGUF file.
        output: folder to write; must not exist, or be empty.
        gguf_file: name of a GGUF file in the source, to be read in place of everything else there. Its tensors are
            unpacked; the tokenizer is made of what the file says.
        mask_token_id: id of [MASK]. By default that of the source's configuration, else that of its tokenizer, else
            an id that the embeddings have a row for and no token uses, else a new one.
        dtype: dtype to save in, e.g. "bfloat16"; by default that of the source, and float32 for a GGUF file.
        revision: branch, tag or commit of a source on the Hub.
        options: arguments of `RelayConfig` that are to differ from the source's, e.g. `block_size`.

    Returns:
        What was renamed, initialised and left out; `print` shows it.

    Raises:
        FileExistsError: `output` exists and is not empty.
        ValueError: the source is no model that can be converted, or an option does not fit.
        OSError: a file cannot be read or written.
        ImportError: GGUF files cannot be read without the package `gguf`.
    """
    source, target = str(source), Path(output)
    if gguf_file is None and source.endswith(".gguf"):
        source, gguf_file = str(Path(source).parent), Path(source).name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"`{target}` exists already: choose another output, or remove it.")
    check_json_files(source)
    file = None if gguf_file is None else open_gguf(source, gguf_file, revision)
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source, revision=revision, gguf_file=gguf_file)
    except OSError as error:
        raise OSError(
            f"`{source}` is not a model ({one_line(error).rstrip('.')}): give a folder that holds a "
            "`config.json`, a GGUF file, or the id of a repository that can be reached."
        ) from error
    if not fields:
        raise FileNotFoundError(f"`{source}` holds no `config.json`: give a checkpoint of transformers.")
    if (family := fields.get("model_type")) == RelayConfig.model_type:
        raise ValueError(f"`{source}` is a relay model already: load it with `AutoModel.from_pretrained`.")
    if unknown := sorted(options.keys() - RELAY_FIELDS):
        raise ValueError(f"`convert` does not take {unknown}: give arguments of `RelayConfig`.")
    if mask_token_id is not None:
        # The family's own id may be outside the vocabulary; one that is given is judged below.
        options["mask_token_id"] = None
    config = load_config(source, revision=revision, gguf_file=gguf_file, **options)
    tokenizer = load_tokenizer(source, config, revision, gguf_file)
    rows = config.text_config.vocab_size
    mask = choose_mask_token(mask_token_id, config.mask_token_id, tokenizer, rows)

    # An id that is still to be added would be outside the vocabulary.
    config.mask_token_id = min(mask.token_id, rows - 1)
    weights = None if file is None else read_gguf_weights(file, source, gguf_file, dtype, revision)
    loaded: Any = RelayForMaskedDiffusion.from_pretrained(
        source if weights is None else None,
        config=config,
        state_dict=weights,
        revision=revision,
        dtype=dtype or "auto",
        output_loading_info=True,
    )
    model, info = loaded
    report = ConversionReport(
        source=source if gguf_file is None else f"{source}/{gguf_file}",
        output=str(target),
        family=family,
        backbone=model.config.text_config.model_type,
        block_size=model.config.block_size,
        token_shift=model.config.token_shift,
        relay_channel=model.config.relay_channel,
        mask_token_id=mask.token_id,
        mask_token=mask.origin,
    )
    _account_for_parameters(report, model, info, list(weights or _parameter_names(source, revision)))
    if weights is not None:
        unpacked_to = str(model.dtype).removeprefix("torch.")
        report.notes.append(f"transformers unpacked the tensors of the GGUF file to {unpacked_to}, under its own names")
    if mask.token_id >= rows:
        report.initialised += add_rows(model, mask.token_id + 1)
        model.config.mask_token_id = mask.token_id
    if (code := code_of_its_own(fields)) is not None:
        report.notes.append(
            f"the source names code of its own (`{code}`), which is not run: taken for a causal decoder; if that code "
            "attends in both directions, give `block_size` and `token_shift`"
        )
    if tokenizer is None:
        report.notes.append("the source has no tokenizer")
    elif tokenizer.chat_template is None:
        report.notes.append("the tokenizer has no chat template")
    _complete_generation_defaults(model, tokenizer, family)
    _write(target, model, tokenizer)
    return report


def _account_for_parameters(
    report: ConversionReport, model: RelayForMaskedDiffusion, info: dict[str, Any], names: list[str]
) -> None:
    """Fills in what became of the parameters; refuses a source of which the model is not the whole."""
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"`{report.source}` lacks {_some(missing)}, which the model would have to invent: convert a complete "
            "checkpoint, whose parameters begin with `model.` and `lm_head.`."
        )
    unexpected = sorted(info["unexpected_keys"])
    lost = [name for name in unexpected if not HARMLESS.search(name)]
    if model.config.relay_channel == "none":
        lost = [name for name in lost if not name.startswith("relay.")]
    if lost:
        raise ValueError(
            f"`{report.source}` has {_some(lost)}, for which a relay model has no place, so it would compute something "
            "else: convert another checkpoint."
        )
    mine, filled = model.state_dict().keys(), set()
    report.left_out += unexpected
    for name in names:
        new = _renamed(name)
        filled.add(new)
        if new != name:
            report.renamed[name] = new
        if new in mine or new in unexpected:
            continue
        # transformers drops some of the harmless ones itself.
        (report.left_out if HARMLESS.search(new) else report.merged).append(name)
    # The model does not call these missing, because a fresh channel is nothing unusual.
    report.initialised += [name for name in mine if name.startswith("relay.") and name not in filled]


def _some(names: list[str]) -> str:
    return f"`{names[0]}`" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _renamed(name: str) -> str:
    for pattern, replacement in FOREIGN_PARAMETER_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def _parameter_names(source: str, revision: str | None) -> list[str]:
    """Names of the source's parameters, in either format and in any number of files."""
    options: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (index := cached_file(source, f"{name}.index.json", **options)) is not None:
            return list(json.loads(Path(index).read_text())["weight_map"])
        if (single := cached_file(source, name, **options)) is None:
            continue
        if name.endswith(".bin"):
            return list(torch.load(single, map_location="meta", mmap=True, weights_only=True))
        with safe_open(single, framework="pt") as file:
            return list(file.keys())
    return []


def _complete_generation_defaults(
    model: RelayForMaskedDiffusion, tokenizer: PreTrainedTokenizerBase | None, family: str
) -> None:
    """Adds the tokenizer's ids to the source's own defaults, where those name none, and the end of a LLaDA's reply."""
    if tokenizer is None:
        return
    defaults = model.generation_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(defaults, name) is None:
            setattr(defaults, name, getattr(tokenizer, name))
    # Its configuration names the end of a text only.
    ends = tokenizer.get_vocab().get(END_OF_TURN)
    if family == "llada" and ends is not None and END_OF_TURN in str(tokenizer.chat_template):
        stops = defaults.eos_token_id if isinstance(defaults.eos_token_id, list) else [defaults.eos_token_id]
        defaults.eos_token_id = [stop for stop in stops if stop not in (None, ends)] + [ends]


def _write(target: Path, model: RelayForMaskedDiffusion, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Saves beside the target and renames, so that half a model is never seen; on an error nothing stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # A folder inside, because a temporary folder itself is closed to other users.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if target.exists():
            target.rmdir()
        folder.rename(target)
