"""The Hub: one commit with everything that a relay model, or an adapter of one, needs to be loaded by others."""

from typing import TYPE_CHECKING

from ..startup.lazy_names import lazy_names

if TYPE_CHECKING:
    from .pushing import push
    from .upload import PushError

__all__ = ["PushError", "push"]

__getattr__ = lazy_names(__name__)
