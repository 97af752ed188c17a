"""Engines of vLLM on tiny models, each beside the model itself; without vLLM, tests that need one are skipped."""

import gc
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .engines import Engine, make_checkpoint

if importlib.util.find_spec("vllm") is not None:
    importlib.import_module(f"{__package__}.shim")  # before vLLM


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """Makes an engine, or finds the one of the same arguments: `engine(model={...}, **options of vLLM)`."""
    made: dict[str, Engine] = {}

    def get(model: dict[str, Any] | None = None, **options: Any) -> Engine:
        key = json.dumps([model, options], sort_keys=True, default=str)
        if key not in made:
            folder: Path = tmp_path_factory.mktemp("model")
            made[key] = Engine(make_checkpoint(folder, **model or {}), folder, **options)
        return made[key]

    yield get
    # Each engine looks for garbage when it ends, and need not look at all that was ever made.
    gc.freeze()
    made.clear()
