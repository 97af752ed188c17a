"""Which checkpoints of a run are whole: every file that was written is there, of its length, and can be read."""

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState

TRAINER_STATE_FILE = "trainer_state.json"
LIST_FILE = "checkpoint_files.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model_fsdp_0")
# People, and callbacks, write into cards.
FREE = (".md", ".png")


def unfinished_mark(checkpoint: Path) -> Path:
    """The file beside a checkpoint that exists while it is written; inside, it would be uploaded with it."""
    return checkpoint.with_name(f"{checkpoint.name}.unfinished")


def begin_checkpoint(checkpoint: Path) -> None:
    """Makes the folder and marks it as unfinished, also if it exists and is written again."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    unfinished_mark(checkpoint).touch()
    (checkpoint / LIST_FILE).unlink(missing_ok=True)


def finish_checkpoint(checkpoint: Path) -> None:
    """Writes the names and lengths of all files into a checkpoint, and takes the mark away."""
    files = {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != LIST_FILE and path.suffix not in FREE
    }
    (checkpoint / LIST_FILE).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")
    unfinished_mark(checkpoint).unlink(missing_ok=True)


def find_problem(checkpoint: Path) -> str | None:
    """Half a sentence about the first file that is missing or damaged; None if the checkpoint is whole.

    Args:
        checkpoint: a folder that the Trainer wrote. Without a list of files, it must have those that every checkpoint
            has.
    """
    if unfinished_mark(checkpoint).exists():
        return f"`{unfinished_mark(checkpoint).name}` is beside it, so it was not written to its end"
    if not (checkpoint / TRAINER_STATE_FILE).is_file():
        return f"`{TRAINER_STATE_FILE}` is missing, so it was not written to its end"
    try:
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_FILE))
        listed = _read_list(checkpoint)
    except (OSError, ValueError, TypeError) as error:
        return f"`{TRAINER_STATE_FILE}` or `{LIST_FILE}` cannot be read ({' '.join(str(error).split())})"
    for name, size in listed.items():
        path = checkpoint / name
        if not path.is_file():
            return f"`{name}` is missing"
        if path.stat().st_size != size:
            return f"`{name}` has {path.stat().st_size} bytes, but was written with {size}"
    if not listed and not any((checkpoint / name).exists() for name in WEIGHTS) and not [*checkpoint.glob("*_model*")]:
        return "the weights are missing"
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and (reason := _why_unreadable(path)):
            return f"`{path.relative_to(checkpoint).as_posix()}` cannot be read ({reason})"
    return None


def _read_list(checkpoint: Path) -> dict[str, int]:
    """Names and lengths; empty for checkpoints of earlier versions."""
    path = checkpoint / LIST_FILE
    if not path.exists():
        return {}
    files = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(files, dict) or not all(isinstance(size, int) for size in files.values()):
        raise ValueError("it is no list of files")
    return files


def _why_unreadable(path: Path) -> str | None:
    """What is wrong with a file of tensors or of JSON; other files are taken as they are."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix == ".json":
            fields = json.loads(path.read_text(encoding="utf-8"))
            shards = set(fields["weight_map"].values()) if path.name.endswith(".index.json") else set()
            if missing := sorted(name for name in shards if not (path.parent / name).is_file()):
                return f"it names `{missing[0]}`, which is missing"
        elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return "it is not what `torch.save` writes, or was cut off"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None
