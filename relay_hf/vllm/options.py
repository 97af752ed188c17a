"""The options of one request, read as `generate` reads its own: from `extra_args`, with the checkpoint's defaults."""

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import RepetitionPenaltyLogitsProcessor

from ..modeling.configuration_relay import RelayConfig
from ..modeling.generation_options_relay import DecodingOptions
from ..modeling.generation_tokens_relay import TokenChooser

logger = logging.getLogger(__name__)

# Options of transformers about drawing, which vLLM refuses among the parameters of a request.
OF_TRANSFORMERS = frozenset(
    {"do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
     "suppress_tokens"}
)  # fmt: skip
OURS = {option.name: option for option in fields(DecodingOptions)}
# vLLM's server turns the booleans of a request into 0 and 1.
SWITCHES = frozenset({"do_sample"} | {name for name, option in OURS.items() if option.type is bool})
# Options of ours that the plug-in does not have, and why.
UNSUPPORTED = {
    "fuse_commits": "vLLM commits every block in a forward of its own",
    "use_sub_block_cache": "vLLM keeps the keys and values of whole blocks",
    "relay_start": "a block starts as `relay_initial_state` says",
    "output_history": "a response has no place for it",
}
# Without these a checkpoint's text would differ, not only its forwards.
DECIDING = ("relay_start",)
# What vLLM itself puts beside the options of a request.
OF_VLLM = ("kv_transfer_params", "ec_transfer_params")


class _Mixin(GenerationMixin):
    """The processors that `generate` makes of its options, without a model."""

    config: Any = SimpleNamespace(is_encoder_decoder=False)


@dataclass(frozen=True)
class RequestOptions:
    """The parsed options of a request.

    Args:
        key: equal for requests of equal options, seeds apart.
        decoding: the options of ours.
        chooser: chooses the token of each scored position.
        seed: what the numbers that tokens are drawn with depend on; None = of the request's id.
    """

    key: str
    decoding: DecodingOptions
    chooser: TokenChooser
    seed: int | None


@dataclass(frozen=True)
class OptionReader:
    """Reads the options of requests to one model.

    Args:
        config: configuration of the model.
        defaults: its generation config, completed with the options of block diffusion.
        device: where logits are.

    Raises:
        ValueError: a default decides the text, and the plug-in does not have it.
    """

    config: RelayConfig
    defaults: GenerationConfig
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        for name, why in UNSUPPORTED.items():
            if (value := getattr(self.defaults, name)) == OURS[name].default:
                continue
            if name in DECIDING:
                raise ValueError(
                    f"`{name}={value!r}` in `generation_config.json` is not supported by vLLM, where {why}: leave it "
                    "out of the file."
                )
            logger.warning("`%s=%r` in `generation_config.json` is not used, because %s.", name, value, why)
            setattr(self.defaults, name, OURS[name].default)

    def read(self, extra_args: Mapping[str, Any] | None) -> RequestOptions:
        """Parses what a request asks for.

        Args:
            extra_args: of the request, `vllm_xargs` in its JSON.

        Raises:
            ValueError: an option is unknown, not supported, has a wrong type or value, or makes no sense for the model.
        """
        given = {name: _typed(name, value) for name, value in (extra_args or {}).items() if name not in OF_VLLM}
        for name, value in given.items():
            if name in UNSUPPORTED and value != OURS[name].default:
                raise ValueError(f"`{name}={value!r}` is not supported, because {UNSUPPORTED[name]}: leave it out.")
        if unknown := sorted(given.keys() - OF_TRANSFORMERS - OURS.keys()):
            known = sorted((OF_TRANSFORMERS | OURS.keys()) - UNSUPPORTED.keys())
            raise ValueError(f"`extra_args` name {unknown}: a relay model takes {known} there.")
        options = copy.deepcopy(self.defaults)
        # As `generate` does, which among others draws from the 50 best tokens unless somebody says otherwise.
        options.update(**options._get_default_generation_params(), defaults_only=True)
        options.update(**given)
        decoding = DecodingOptions.of(self.config, options)
        seeds = decoding.sampling_seeds
        if seeds is not None and len(seeds) != 1:
            raise ValueError(f"`sampling_seeds={seeds}` has {len(seeds)} numbers for one request: give one.")
        return RequestOptions(
            key=json.dumps({**given, "sampling_seeds": None}, sort_keys=True, default=str),
            decoding=decoding,
            chooser=self._chooser(options, decoding),
            seed=None if seeds is None else seeds[0],
        )

    def _chooser(self, options: GenerationConfig, decoding: DecodingOptions) -> TokenChooser:
        mixin: Any = _Mixin()
        made = mixin._get_logits_processor(options, input_ids_seq_length=1, device=self.device)
        if any(isinstance(each, RepetitionPenaltyLogitsProcessor) for each in made):
            raise ValueError("`repetition_penalty` is not supported, a step does not show it the text: leave it out.")
        mask_token_id: Any = self.config.mask_token_id
        return TokenChooser(decoding.processors(made), options.do_sample, mask_token_id, decoding.policy.reads)


def _typed(name: str, value: Any) -> Any:
    """The value as `generate` takes it, whatever JSON and vLLM's server have made of it."""
    if name in SWITCHES and value in (0, 1):
        return bool(value)
    return [value] if name == "sampling_seeds" and isinstance(value, int) else value
