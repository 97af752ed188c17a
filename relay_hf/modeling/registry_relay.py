"""Classes that an option of the library names. Other packages add their own by a `register_...` function."""

from typing import Any, Generic, TypeVar

Kind = TypeVar("Kind")


class Registry(dict[str, type[Kind]], Generic[Kind]):
    """Name -> class.

    Args:
        option: option whose values the names are, such as `"relay_channel"`.
        base: class that all of them inherit from.
        register: public function that adds a class, such as `"relay_hf.register_channel"`.
    """

    def __init__(self, option: str, base: type[Kind], register: str) -> None:
        super().__init__()
        self.option = option
        self.base = base
        self.register = register

    def add(self, name: str, cls: type[Kind]) -> None:
        """Adds a class. A class that is defined again, as in a notebook's cell that runs twice, replaces the former.

        Raises:
            ValueError: `name` is no text, or taken by another class; or `cls` is no subclass of `base`.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"`{self.register}` was given the name {name!r}: give a text, the `{self.option}` to be.")
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise ValueError(
                f"`{self.register}({name!r}, ...)` was given {cls!r}: give a subclass of `{self.base.__name__}`."
            )
        if name in self and _path_of(self[name]) != _path_of(cls):
            raise ValueError(f"`{self.option}={name!r}` is taken by `{_path_of(self[name])}`: choose another name.")
        self[name] = cls

    def find(self, name: Any) -> type[Kind]:
        """The class of a name.

        Raises:
            ValueError: no class has it.
        """
        if not isinstance(name, str) or name not in self:
            raise ValueError(
                f"`{self.option}={name!r}` is unknown: choose one of {sorted(self)}, or first import the module that "
                f"registers it with `{self.register}`."
            )
        return self[name]


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
