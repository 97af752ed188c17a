"""The one place that knows that versions of transformers differ.

transformers 5.24 renamed the cache of every model from `past_key_values` to `cache`. Our own name is `cache`; what we
pass on to transformers has the name that the installed version reads.
"""

import inspect
from typing import Any

from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput
from transformers.utils.deprecation import deprecate_kwarg

# What transformers calls the cache: the argument of backbones, mask functions and `generate`.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# Decorator of a `forward`: a caller's `past_key_values` is taken for `cache`, with transformers' warning.
takes_past_key_values = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")


def as_cache_argument(cache: Cache | None) -> dict[str, Cache | None]:
    """The cache under the name by which the installed transformers takes it."""
    return {CACHE_ARGUMENT: cache}


def pop_cache(model_kwargs: dict[str, Any]) -> Any:
    """Takes the cache out of the keyword arguments of `generate`, whichever name the caller used; None without one."""
    given = [model_kwargs.pop(name, None) for name in ("cache", "past_key_values")]
    return next((cache for cache in given if cache is not None), None)


class CacheOutput(ModelOutput):
    """Output with a field `cache`, also read as `past_key_values`, as transformers 5.24 lets all outputs be."""

    if CACHE_ARGUMENT != "cache":

        @property
        def past_key_values(self) -> Cache | None:
            """The field `cache`."""
            return self.cache
