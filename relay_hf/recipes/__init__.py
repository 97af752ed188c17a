"""Recipes for `relay-hf train --config NAME`, as YAML files beside this one."""

from pathlib import Path

__all__ = ["recipe_path"]


def recipe_path(name: str | None = None) -> Path:
    """The path of a recipe.

    Args:
        name: a YAML file, or the name of one beside this module, with or without `.yaml`; None = the folder of those.

    Raises:
        ValueError: the name is neither a file nor a recipe.
    """
    folder = Path(__file__).parent
    if name is None:
        return folder
    for path in (Path(name), folder / name, folder / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ValueError(f"`--config={name}` is no recipe: give a YAML file, or one of the library's recipes ({known}).")
