"""The output folder of `relay-hf train`: whose it is, and how a training that left it goes on."""

import argparse
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Files that a training leaves in its folder; all others are ignored.
LEFT_BY_A_RUN = (
    "checkpoint-*", "merged", "*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json",
    "generation_config.json", "training_args.bin",
)  # fmt: skip
MERGED = "merged"


def check_output(
    folder: Path, resume: str | bool | None, overwrite: bool, merges: bool, sources: Sequence[str | None]
) -> list[Path]:
    """Raise if the folder holds a model or checkpoints that this run would mix with its own.

    Args:
        folder: the output.
        resume: the checkpoint that the run goes on from; True = the last of `folder`.
        overwrite: whether the user wants the folder's contents to be replaced.
        merges: whether the run will write a merged model.
        sources: models that the run reads.

    Returns:
        The files and folders to be replaced.

    Raises:
        ValueError: the folder is in use.
    """
    place = folder.resolve()
    if resume is True or (isinstance(resume, str) and Path(resume).resolve().parent == place):
        if (folder / MERGED).exists() and not merges:
            raise ValueError(
                f"`{folder / MERGED}` holds a merged model, which this run would leave older than what it trains: "
                "remove it, or merge again with `--use_peft true --save_merged true`."
            )
        return []
    found = sorted({path for pattern in LEFT_BY_A_RUN for path in folder.glob(pattern)})
    if found and not overwrite:
        raise ValueError(
            f"`output_dir={folder}` holds `{found[0].name}` of another run: give another folder, go on with "
            "`--resume_from_checkpoint true`, or replace it with `--overwrite_output_dir true`."
        )
    read = [Path(source).resolve() for source in (*sources, resume) if isinstance(source, str)]
    if found and (mine := [path for path in read if path == place or place in path.parents]):
        raise ValueError(
            f"`overwrite_output_dir` would remove `{mine[0]}`, which this run reads: give another `output_dir`."
        )
    return found


def remove(paths: Sequence[Path]) -> None:
    """Removes files and folders."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def leaves_no_empty_folder(folder: Path) -> Iterator[None]:
    """Removes what was made of the folder inside, and of those around it, if nothing was put there."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    finally:
        for place in missing:
            try:
                place.rmdir()
            except OSError:  # it is not empty, or was never made
                break


def resume_command(program: str, argv: Sequence[str], checkpoint: Path) -> str:
    """The command that goes on from a checkpoint, as it can be typed into a shell in the same folder."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume_from_checkpoint", "--resume-from-checkpoint", nargs="?")
    _, others = parser.parse_known_args(argv)
    return command(program, *others, "--resume_from_checkpoint", str(checkpoint))


def command(program: str, *argv: str) -> str:
    """A command line, quoted for the shell."""
    name, *rest = program.split()
    return shlex.join([*_started_by(name), *rest, *argv])


def _started_by(name: str) -> list[str]:
    """How this process was started: by the script on the path, by the script elsewhere, or as a module."""
    script = Path(sys.argv[0])
    if (script.parent.name, script.name) == ("relay_hf", "__main__.py"):
        return [sys.executable, "-m", "relay_hf"]
    found = shutil.which(name)
    is_elsewhere = script.name == name and not (found and script.exists() and script.samefile(found))
    return [str(script) if is_elsewhere else name]
