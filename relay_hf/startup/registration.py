"""Makes sure that the Auto classes of transformers know Relay wherever `relay_hf` is imported.

`relay_hf.modeling` registers its classes, but needs torch and seconds, which a command line that only prints its help
should not take. An Auto class cannot be used before transformers is imported, so `import relay_hf` either finds it
imported and imports the model at once, or waits for it.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LIBRARY, MODELS = "transformers", "relay_hf.modeling"


def register_with_transformers() -> None:
    """Registers Relay now if transformers has been imported, else right after it will be."""
    if LIBRARY in sys.modules:
        importlib.import_module(MODELS)
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds transformers through the other finders, and adds the registration to its loading."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != LIBRARY:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        loader: Any = spec and spec.loader

        def execute_and_register(module: ModuleType) -> None:
            del loader.exec_module  # from now on as without us
            loader.exec_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            # If the model imports transformers, it is being imported already, and registers at its end.
            importlib.import_module(MODELS)

        if loader is not None:
            loader.exec_module = execute_and_register
        return spec
