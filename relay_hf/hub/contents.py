"""What goes into the commit: gathers the files in a scratch folder and completes them for other machines."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .. import modeling
from ..hub_cards import (
    CARD,
    RelayCardData,
    has_card,
    is_hub_id,
    plain_card,
    read_card,
    save_card,
    set_usage,
    usage_snippet,
)
from ..loading.tokenizer import load_tokenizer
from ..modeling import RelayConfig, RelayForMaskedDiffusion
from ..modeling.loading_adapters_relay import ADAPTER_BASE_FIELD, complete_adapter

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors")
# One kind of model replaces another: what the repository has of these, and the commit does not, goes.
REPLACED = (*WEIGHTS, "model.safetensors.index.json", ADAPTER_CONFIG, "*_relay.py")
# Anything else in the folder stays private: optimizer states, logs, data.
KEPT = (
    *REPLACED,
    CONFIG,
    "generation_config.json",
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *(CARD, "LICENSE*", "*.png", "*.svg", ".eval_results/*.yaml"),
)
# `modeling/__init__.py` stays at home: the modules import each other by name.
CODE = sorted(Path(modeling.__file__).parent.glob("*_relay.py"))
AUTO_MAP = dict.fromkeys(
    ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"), "modeling_relay.RelayForMaskedDiffusion"
) | {"AutoConfig": "configuration_relay.RelayConfig"}


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path relative to the repository is one of these; a star stays within a folder."""
    return any(path.count("/") == pattern.count("/") and fnmatch(path, pattern) for pattern in patterns)


def whole_model_beside(folder: str | Path | None) -> Path | None:
    """The merged model inside the folder of an adapter, as `relay-hf train` writes it; None if there is none."""
    if folder is None or not (Path(folder) / ADAPTER_CONFIG).is_file():
        return None
    merged = Path(folder) / "merged"
    return merged if (merged / CONFIG).is_file() else None


def gather(source: Any, scratch: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Puts the files of a model, or of the folder of one, into `scratch`. The source does not change.

    Raises:
        ValueError: the source is no folder and no relay model, or a file links out of the folder.
        FileNotFoundError: the folder does not exist, or holds no model.
    """
    if isinstance(source, str | Path):
        _copy(Path(source), scratch)
    else:
        _save(source, scratch)
    if tokenizer is not None:
        tokenizer.save_pretrained(scratch)
    if not has_card(scratch):
        (scratch / CARD).unlink(missing_ok=True)


def complete(
    scratch: Path,
    repo_id: str,
    *,
    folder: str | None,
    base_model: str | None,
    card: RelayCardData | None,
    write_card: bool,
) -> str | None:
    """Add code and `auto_map`, point adapter loaders here, write or update the card.

    Args:
        scratch: folder with the files of `gather`.
        repo_id: repository that they will be pushed to.
        folder: folder that they come from, if any; code in the card loads the model from there.
        base_model: Hub id of an adapter's base, if it was trained from elsewhere.
        card: replaces the one in the folder.
        write_card: whether to write a card for a repository without one.

    Returns:
        The Hub id of an adapter's base; None for whole models.

    Raises:
        ValueError: an adapter's base is not on the Hub, or the metadata of the card cannot be read.
    """
    for path in CODE:
        shutil.copyfile(path, scratch / path.name)
    fields = json.loads((scratch / CONFIG).read_text(encoding="utf-8"))
    fields["auto_map"] = AUTO_MAP
    base = None
    if (scratch / ADAPTER_CONFIG).exists():
        base = base_model or fields.get(ADAPTER_BASE_FIELD)
        if not is_hub_id(base):
            merged = whole_model_beside(folder)
            whole = f"`{merged}`, which holds the whole model" if merged else "the model of `merge_and_unload()`"
            raise ValueError(
                f"The adapter's base is `{base}`, which others cannot load: push the base and name it as `base_model`, "
                f"or push {whole}."
            )
        fields[ADAPTER_BASE_FIELD] = base
        adapter = json.loads((scratch / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        # Loaders of adapters go to the base for a configuration: here they find ours, which knows the real one.
        adapter["base_model_name_or_path"] = repo_id
        # Without a task, PEFT's own Auto classes would import this library, which they refuse.
        adapter["task_type"] = adapter.get("task_type") or "CAUSAL_LM"
        _write_json(scratch / ADAPTER_CONFIG, adapter)
    elif base_model is not None:
        raise ValueError(f"`base_model={base_model!r}` is for adapters, and this is a whole model: leave it out.")
    _write_json(scratch / CONFIG, fields)
    _complete_card(scratch, repo_id, folder, base, card, write_card)
    return base


def _copy(folder: Path, scratch: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"`{folder}` is no folder: give one that `save_pretrained` or a trainer wrote.")
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        is_kept = path.is_file() and matches(name, KEPT)
        # A linked folder is not looked into.
        is_folder = path.is_symlink() and path.is_dir() and any(kept.startswith(f"{name}/") for kept in KEPT)
        # What others are to see lies in the folder.
        if (is_kept or is_folder) and not (place := path.resolve()).is_relative_to(folder.resolve()):
            raise ValueError(
                f"`{path}` is a link to `{place}`, out of the folder: put a copy there, or remove the link."
            )
        if not is_kept:
            continue
        target = scratch / name
        target.parent.mkdir(exist_ok=True)
        if matches(name, WEIGHTS):
            target.symlink_to(path.resolve())  # large, and nothing writes to them
        else:
            shutil.copyfile(path, target)
    if not (scratch / CONFIG).exists():
        if (scratch / ADAPTER_CONFIG).exists():
            merged = whole_model_beside(folder)
            raise FileNotFoundError(
                f"`{folder}` holds an adapter, but no `config.json` of its relay model: save it with "
                f"`RelayTrainer`, or push {f'`{merged}`, which holds the whole model' if merged else 'the PeftModel'}."
            )
        raise FileNotFoundError(f"`{folder}` holds no `config.json`: give the folder of a saved relay model.")


def _save(model: Any, scratch: Path) -> None:
    relay = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(relay, RelayForMaskedDiffusion):
        raise ValueError(
            f"`source` is a {type(model).__name__}: give a folder, a `RelayForMaskedDiffusion` or a `PeftModel`."
        )
    model.save_pretrained(scratch)
    complete_adapter(relay, scratch)


def _complete_card(
    scratch: Path, repo_id: str, folder: str | None, base: str | None, given: RelayCardData | None, write_card: bool
) -> None:
    config = RelayConfig.from_pretrained(scratch)
    tokenizer = load_tokenizer(str(scratch), config)
    usage = usage_snippet(repo_id, config, tokenizer) if tokenizer is not None else ""
    if given is not None:
        save_card(given, scratch)
    elif write_card and not (scratch / CARD).exists():
        save_card(plain_card(repo_id.split("/")[1], config, usage, base), scratch)
    if not (scratch / CARD).exists():
        return
    set_usage(scratch, repo_id, usage, earlier_id=folder)
    if base is not None:
        card = read_card(scratch)
        card.data.base_model = base
        card.data.base_model_relation = "adapter"
        card.save(scratch / CARD)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
