"""The one place that knows that versions of transformers differ.

transformers 5.24 renamed the cache of every model from `past_key_values` to `cache`. Our own name is `cache`; what we
pass on to transformers has the name that the installed version reads. What came with 5.20 to 5.23 is made up for here.
"""

import inspect
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    configuration_utils,
    modeling_utils,
)
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput, logging, output_capturing
from transformers.utils.deprecation import deprecate_kwarg

logger = logging.get_logger(__name__)

NEWEST_TESTED = "5.24"


def warn_of_untested(version: str) -> None:
    """Warns once if `version` of transformers is a newer minor one than those that the tests know."""
    installed = [int(part) for part in version.split(".")[:2]]
    if installed > [int(part) for part in NEWEST_TESTED.split(".")]:
        logger.warning_once(
            f"transformers {version} is newer than {NEWEST_TESTED}, the newest version that relay_hf was tested with."
        )


warn_of_untested(transformers.__version__)

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


class BackboneHolderConfig(PreTrainedConfig):
    """Configuration whose field `text_config` may be given as configuration, dictionary or None (Qwen2)."""

    if TYPE_CHECKING:  # a field of the class that is built on this one
        text_config: Any

    if hasattr(configuration_utils, "SubConfigSpec"):
        sub_configs_defaults = {
            "text_config": configuration_utils.SubConfigSpec(config_class=AutoConfig, model_type="qwen2")
        }
    else:  # before 5.20, where every class makes its own
        sub_configs = {"text_config": AutoConfig}

        def __post_init__(self, **kwargs: Any) -> None:
            if not isinstance(self.text_config, PreTrainedConfig):
                fields = {"model_type": "qwen2", **(self.text_config or {})}
                self.text_config = CONFIG_MAPPING[fields["model_type"]](**fields)
            super().__post_init__(**kwargs)


def slice_logits_to_keep(tensor: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """(B, L, X) -> the positions that `logits_to_keep` means to transformers.

    Args:
        tensor: (B, L, X).
        logits_to_keep: how many of the last, 0 = all; (N,) positions of every row; (B, N) positions of each; or (B, L)
            bool, which gives (N, X).
    """
    if hasattr(modeling_utils, "slice_logits_to_keep"):
        return modeling_utils.slice_logits_to_keep(tensor, logits_to_keep)
    # Before 5.21.
    if isinstance(logits_to_keep, int):
        return tensor[:, -logits_to_keep:]
    if logits_to_keep.ndim == 2 and logits_to_keep.dtype != torch.bool:
        return tensor.take_along_dim(logits_to_keep[..., None], dim=1)
    return tensor[logits_to_keep] if logits_to_keep.ndim == 2 else tensor[:, logits_to_keep]


def hidden_states_request(asked: bool | int | list[int]) -> bool | int | list[int]:
    """`output_hidden_states` for a backbone, so that each index that is asked for is one of `hidden_states`.

    Before 5.23 a list counted the layers in another way, so all are asked for.
    """
    if isinstance(asked, bool) or hasattr(output_capturing, "selected_hidden_states"):
        return asked
    return True


def checkpointing_drops_caches(model: PreTrainedModel) -> bool:
    """Whether layers get no cache now, because the backward pass would run them again.

    Where no gradient is wanted there is no backward pass, but before 5.24 they get none there either.
    """
    # 5.23 renamed the property.
    has_new_name = hasattr(PreTrainedModel, "is_activation_checkpointing")
    is_checkpointing = model.is_activation_checkpointing if has_new_name else model.is_gradient_checkpointing
    return model.training and is_checkpointing and (torch.is_grad_enabled() or CACHE_ARGUMENT != "cache")
