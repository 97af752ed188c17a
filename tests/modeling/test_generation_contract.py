"""The underscored methods of GenerationMixin that ours overrides: still there, still called, same arguments."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationMixin

from relay_hf.modeling.generation_relay import RelayGenerationMixin

from ..conftest import MASK

OVERRIDDEN = [
    "_extract_generation_mode_kwargs",
    "_prepare_cache_for_generation",
    "_prepare_generated_length",
    "_prepare_generation_config",
    "_prepare_model_inputs",
    "_sample",
    "_validate_generated_length",
    "_validate_generation_mode",
    "_validate_model_kwargs",
]


def parameters(owner: type, name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(owner, name)).parameters)


def test_overridden_methods_are_those_listed() -> None:
    """A method that transformers drops or renames would leave ours uncalled, and this list longer than the overlap."""
    ours = {name for name in vars(RelayGenerationMixin) if name.startswith("_") and not name.startswith("__")}
    assert sorted(ours & set(dir(GenerationMixin))) == OVERRIDDEN
    assert ours == set(OVERRIDDEN)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_method_accepts_arguments_of_transformers(name: str) -> None:
    theirs, ours = parameters(GenerationMixin, name), parameters(RelayGenerationMixin, name)
    takes_any_name = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in ours.values())
    plain = [name for name, p in theirs.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    assert takes_any_name or set(plain) <= ours.keys()


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_method_requires_nothing_more(name: str) -> None:
    theirs, ours = parameters(GenerationMixin, name), parameters(RelayGenerationMixin, name)
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    required = [n for n, p in ours.items() if p.default is inspect.Parameter.empty and p.kind not in kinds]
    assert set(required) <= theirs.keys()
    # Those of theirs that ours names stand in the same order, so that positional calls mean the same.
    common = [n for n in theirs if n in ours]
    assert common == [n for n in ours if n in theirs]


@pytest.mark.parametrize("block_size", [8, None])
def test_overridden_methods_all_called_by_generate(
    make_model: Callable, monkeypatch: pytest.MonkeyPatch, block_size: int | None
) -> None:
    called: set[str] = set()

    def spying(name: str, method: Callable) -> Callable:
        def spy(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return method(*args, **kwargs)

        return spy

    for name in OVERRIDDEN:
        monkeypatch.setattr(RelayGenerationMixin, name, spying(name, getattr(RelayGenerationMixin, name)))
    model, last, options = make_model(block_size=block_size), 3, {"max_new_tokens": 4}
    if block_size is None:
        last, options = MASK, {}
    model.generate(torch.tensor([[1, 2, last]]), **options)
    assert sorted(called) == OVERRIDDEN
