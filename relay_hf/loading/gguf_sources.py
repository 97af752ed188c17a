"""Says what to do with GGUF files where a model is asked for."""

from pathlib import Path


def refuse_gguf(source: str) -> None:
    """Raise if the source of a model is a GGUF file, or a folder with nothing else to load.

    Raises:
        ValueError: the source must be converted first.
    """
    path = Path(source)
    files = [path] if path.suffix.lower() == ".gguf" else sorted(path.glob("*.gguf"))
    if files and not (path / "config.json").exists():
        raise ValueError(
            f"`{files[0]}` is a GGUF file, which cannot be loaded here: run `relay-hf convert {files[0]} FOLDER`, and "
            "give that folder."
        )
