"""What an option of the library names. Other packages add their own classes by a `register_...` function."""

from typing import Any, Generic, TypeVar

Kind = TypeVar("Kind")


class Registry(dict[str, Kind], Generic[Kind]):
    """Name -> class. A subclass of `Registry` may hold other things by name.

    Args:
        option: option whose values the names are, such as `"relay_channel"`.
        base: class that all of them inherit from.
        register: public function that adds a class, such as `"relay_hf.register_channel"`.
    """

    def __init__(self, option: str, base: type, register: str) -> None:
        super().__init__()
        self.option = option
        self.base = base
        self.register = register

    def add(self, name: str, member: Kind) -> None:
        """Adds a member. One that is defined again, as in a notebook's cell that runs twice, replaces the former.

        Raises:
            ValueError: `name` is no text, or taken by another member; or `member` is of the wrong kind.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"`{self.register}` was given the name {name!r}: give a text, the `{self.option}` to be.")
        if problem := self.problem(member):
            raise ValueError(f"`{self.register}({name!r}, ...)` was given {member!r}: {problem}.")
        if name in self and self.identity(self[name]) != self.identity(member):
            raise ValueError(f"`{self.option}={name!r}` is taken {self.identity(self[name])}: choose another name.")
        self[name] = member

    def find(self, name: Any) -> Kind:
        """The member of a name.

        Raises:
            ValueError: no member has this name.
        """
        if not isinstance(name, str) or name not in self:
            raise ValueError(
                f"`{self.option}={name!r}` is unknown: choose one of {sorted(self)}, or first import the module that "
                f"registers it with `{self.register}`."
            )
        return self[name]

    def problem(self, member: Any) -> str:
        """What to give instead of `member`; empty if it can be added."""
        is_fit = isinstance(member, type) and issubclass(member, self.base)
        return "" if is_fit else f"give a subclass of `{self.base.__name__}`"

    def identity(self, member: Any) -> str:
        """What two definitions of the same member have in common; in messages it follows "is taken"."""
        return f"by `{member.__module__}.{member.__qualname__}`"
