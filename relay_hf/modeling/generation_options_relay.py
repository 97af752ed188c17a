"""The options of block diffusion: names, types, defaults, meaning and refusals, all in `DecodingOptions`.

A new option is a new field, with a sentence in the docstring. Other parts of the library call `option_names`.
"""

import math
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LinearTemperatureScheduleLogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
)

from .channel_relay import CHANNELS
from .configuration_relay import RelayConfig, check_same_tokens
from .generation_processors_relay import AFTER_TEMPERATURE, check_transformers_options, fit_processors
from .generation_start_relay import STARTS
from .loading_families_relay import foreign_generation_to_relay
from .unmasking_relay import UnmaskingPolicy, make_policy

Subject = Literal["unmasking", "drawing", "result"]
# Annotation of an option -> what `isinstance` accepts, and the sentence for everything else.
_TYPES: dict[Any, tuple[Any, str]] = {
    bool: (bool, "must be True or False."),
    int | None: (int | None, "is not a whole number: give one, or `None`."),
    float | None: (int | float | None, "is not a number: give a temperature, or `None`."),
}


@dataclass(frozen=True)
class DecodingOptions:
    """What `generate` takes beside the options of transformers, by keyword or in `model.generation_config`.

    The defaults are those of a model with blocks; `default_options` has those of any model.

    Args:
        unmasking_policy: `"confidence_threshold"`, `"confidence_budget"`, `"fixed_count"`, `"time_schedule"`,
            `"entropy_bound"`, or the name of one that was registered.
        unmasking_threshold: the number that the policy compares with.
        denoising_steps: steps that a block, or a sub-block, takes. `fixed_count` and `time_schedule` spread its
            positions over them, `confidence_threshold` reveals at least an even share per step.
        unmasking_order: the positions that `fixed_count` and `time_schedule` reveal first. `"confidence"`: those with
            the most probable token; `"entropy"`: the least entropy; `"margin"`: the greatest difference of the two
            best probabilities; `"left_to_right"`.
        unmasking_count: how many of the most probable positions `confidence_threshold` reveals in any case.
        confidence_top_k: keep only so many tokens of each distribution, the most probable ones, greedy or not.
        sub_block_size: positions of a block that are revealed before the next ones, left to right; `None` = the whole
            block. On a canvas that text is appended to, sub-blocks are counted from the end of each row's prompt.
        use_sub_block_cache: a forward at a sub-block's start computes the keys and values of the whole block, the
            following ones pass only the sub-block through the network. An approximation that is faster: the rest of the
            block does not see the tokens that those forwards reveal. `"prefix"`: they pass the sub-block and the rest.
        fuse_commits: commit a finished block in the first denoise forward of the next one: one forward fewer per block.
            In a token-shift model, that forward sees [MASK] in place of the block's first token.
        use_relay: carry the relay state between denoising steps.
        relay_start: state of a block's first step. `None`: that of `config.relay_initial_state`; `"self"`: the state
            that one more denoise forward leaves, with nothing injected; `"reference"`: the predictions of another model
            of the same tokens and blocks, given as `reference_model`, for channels that read distributions.
        t_max, t_min: temperature at a block's first step, and the one to which it falls linearly as the block is
            revealed.
        sampling_seeds: one number per returned row, with which it draws the same tokens in any batch, on any device.
        output_history: return, as `history`, which forward revealed which token (with `return_dict_in_generate=True`).

    Raises:
        ValueError: an option has a wrong type, is out of range, or makes no sense together with another.
    """

    unmasking_policy: str = "confidence_threshold"
    unmasking_threshold: float = 0.85
    denoising_steps: int | None = None
    unmasking_order: str = "confidence"
    unmasking_count: int = 1
    confidence_top_k: int | None = None
    sub_block_size: int | None = 8
    use_sub_block_cache: bool | str = False
    fuse_commits: bool = False
    use_relay: bool = True
    relay_start: str | None = None
    t_max: float | None = field(default=None, metadata={"about": "drawing"})
    t_min: float | None = field(default=None, metadata={"about": "drawing"})
    sampling_seeds: list[int] | None = field(default=None, metadata={"about": "drawing"})
    output_history: bool = field(default=False, metadata={"about": "result"})

    @classmethod
    def of(
        cls, config: RelayConfig, generation_config: GenerationConfig, reference_model: Any = None
    ) -> "DecodingOptions":
        """Parses the options of one `generate`.

        Args:
            config: configuration of the model.
            generation_config: the options of this `generate`, those of block diffusion included.
            reference_model: the model for `relay_start="reference"`, or None.

        Raises:
            ValueError: an option, ours or one of transformers, has a wrong type, is out of range, has no effect, or
                makes no sense for the model or together with another.
        """
        options = cls(**{option.name: getattr(generation_config, option.name) for option in fields(cls)})
        check_transformers_options(config, generation_config)
        options._check_model(config)
        options._check_reference(config, reference_model)
        options._check_generation_config(generation_config)
        return options

    @cached_property
    def policy(self) -> UnmaskingPolicy:
        """The policy that chooses the positions to reveal."""
        return make_policy(
            self.unmasking_policy,
            self.unmasking_threshold,
            self.denoising_steps,
            self.unmasking_order,
            self.unmasking_count,
        )

    def processors(self, given: LogitsProcessorList) -> LogitsProcessorList:
        """The given logits processors in the form that the block decoder calls, with those of our own options.

        Raises:
            ValueError: a processor of transformers reads the order of tokens.
        """
        fitted = fit_processors(given)
        if self.confidence_top_k is not None:
            fitted.append(TopKLogitsWarper(self.confidence_top_k))
        if self.t_max is not None:
            place = next((i for i, p in enumerate(fitted) if isinstance(p, AFTER_TEMPERATURE)), len(fitted))
            fitted.insert(place, LinearTemperatureScheduleLogitsProcessor(self.t_min, self.t_max, 1))
        return fitted

    def seeds(self, rows: int) -> Tensor:
        """(B,) long, one per row; by default from torch's own generator, which `torch.manual_seed` sets.

        Raises:
            ValueError: `sampling_seeds` has another number of seeds than rows.
        """
        if self.sampling_seeds is None:
            return torch.randint(2**62, (rows,))
        if len(self.sampling_seeds) != rows:
            count = len(self.sampling_seeds)
            raise ValueError(f"`sampling_seeds` has {count} numbers for {rows} rows: give one per returned row.")
        return torch.tensor(self.sampling_seeds, dtype=torch.long)

    def __post_init__(self) -> None:
        _ = self.policy  # raises if one of its options is invalid
        for option in fields(self):
            value, (accepted, sentence) = getattr(self, option.name), _TYPES.get(option.type, (None, ""))
            if accepted and (not isinstance(value, accepted) or isinstance(value, bool) != (accepted is bool)):
                raise ValueError(f"`{option.name}={value!r}` {sentence}")
        cached, size, best = self.use_sub_block_cache, self.sub_block_size, self.confidence_top_k
        if not isinstance(cached, bool) and cached != "prefix":
            raise ValueError(f"`use_sub_block_cache={cached!r}` must be True or False, or 'prefix'.")
        if cached and size is None:
            raise ValueError(
                f"`use_sub_block_cache={cached}` has no sub-blocks to work with: also set `sub_block_size`."
            )
        if best is not None and best < 2:
            # One token alone would be certain, and could be [MASK].
            raise ValueError(f"`confidence_top_k={best}` is not a whole number >= 2: give one, or `None` for all.")
        if self.relay_start is not None:
            self._check_start()
        self._check_drawing()

    def _check_start(self) -> None:
        start = self.relay_start
        if not isinstance(start, str) or start not in STARTS:
            raise ValueError(
                f"`relay_start={start!r}` is unknown: choose one of {sorted(STARTS)}, or `None` for the "
                "configuration's `relay_initial_state`."
            )
        if not self.use_relay:
            raise ValueError(f"`relay_start={start!r}` starts a state, but `use_relay=False`: leave one of them out.")

    def _check_drawing(self) -> None:
        hottest, coldest, seeds = self.t_max, self.t_min, [] if self.sampling_seeds is None else self.sampling_seeds
        if not isinstance(seeds, list) or not all(type(seed) is int and -(2**63) <= seed < 2**63 for seed in seeds):
            raise ValueError(f"`sampling_seeds={seeds!r}` is not a list of 64-bit integers: give one per returned row.")
        if (hottest is None) != (coldest is None):
            raise ValueError("`t_max` and `t_min` are the two ends of one schedule: give both, or neither.")
        if hottest is not None and not math.inf > hottest >= coldest > 0:
            raise ValueError(f"`t_max={hottest}` and `t_min={coldest}` must be temperatures with t_max >= t_min > 0.")

    def _check_model(self, config: RelayConfig) -> None:
        block_size, channel = config.block_size, config.relay_channel
        size, start = self.sub_block_size, self.relay_start
        if size is not None and (size < 1 or (block_size and block_size % size)):
            raise ValueError(
                f"`sub_block_size={size}` does not divide the model's `block_size={block_size}`: choose a divisor, or "
                "`None` for the whole block."
            )
        if self.fuse_commits and block_size is None:
            raise ValueError("`fuse_commits=True` has no blocks to commit with `block_size=None`: leave it out.")
        if start is not None and channel == "none":
            raise ValueError(f"`relay_start={start!r}` starts a state, but the model carries none: leave it out.")
        if start == "reference" and not CHANNELS[channel].reads_distribution:
            raise ValueError(
                f"`relay_start={start!r}` makes a state of predictions, but `relay_channel={channel!r}` carries hidden "
                "states: choose 'self'."
            )

    def _check_reference(self, config: RelayConfig, reference_model: Any) -> None:
        if self.relay_start == "reference":
            if reference_model is None:
                raise ValueError("`relay_start='reference'` has no model to ask: also pass one as `reference_model`.")
            check_same_tokens(config, reference_model)
        elif reference_model is not None:
            raise ValueError(
                f"`reference_model` is not asked with `relay_start={self.relay_start!r}`: set "
                "`relay_start='reference'`, or leave the model out."
            )

    def _check_generation_config(self, generation_config: GenerationConfig) -> None:
        temperature = generation_config.temperature
        for name in ("t_max", "sampling_seeds"):
            if getattr(self, name) is not None and not generation_config.do_sample:
                raise ValueError(f"`{name}` is about drawing tokens, but decoding is greedy: set `do_sample=True` too.")
        if self.t_max is not None and temperature not in (None, 1.0):
            raise ValueError(
                f"`temperature={temperature}` and `t_max={self.t_max}` both set the temperature: give one."
            )
        if self.output_history and not generation_config.return_dict_in_generate:
            raise ValueError("`output_history=True` has nowhere to go: also set `return_dict_in_generate=True`.")


def option_names(*subjects: Subject) -> tuple[str, ...]:
    """Names of the options that concern one of the subjects.

    `"unmasking"`: the positions that a step reveals and passes through the network; `"drawing"`: how tokens are drawn,
    which a task decides; `"result"`: what `generate` returns beside the text.
    """
    return tuple(
        option.name for option in fields(DecodingOptions) if option.metadata.get("about", "unmasking") in subjects
    )


# Options that make decoding greedy even if the model's own `generation_config` draws tokens.
GREEDY: dict[str, Any] = {"do_sample": False, **dict.fromkeys(option_names("drawing"))}


def default_options(config: RelayConfig) -> dict[str, Any]:
    """The options of a model whose `generation_config` sets none.

    Raises:
        ValueError: the configuration's `generation_defaults` are not options of block diffusion.
    """
    defaults = {option.name: option.default for option in fields(DecodingOptions)}
    own = config.generation_defaults or {}
    if unknown := sorted(own.keys() - defaults.keys()):
        raise ValueError(f"`generation_defaults` name {unknown}: give options of block diffusion, {sorted(defaults)}.")
    if config.block_size is None:
        defaults |= {"unmasking_policy": "confidence_budget", "unmasking_threshold": 0.15}
    if config.block_size is None or config.block_size % DecodingOptions.sub_block_size:
        defaults["sub_block_size"] = None
    return {**defaults, **own}


def complete_generation_config(config: RelayConfig, generation_config: GenerationConfig) -> None:
    """Adds the options of block diffusion that a generation config lacks, so that `generate` accepts them.

    The options of another family's file are translated first.

    Args:
        config: configuration of the model.
        generation_config: changed in place.

    Raises:
        ValueError: the configuration's `generation_defaults` are not options of block diffusion.
    """
    for name, value in foreign_generation_to_relay(generation_config.to_dict()).items():
        if value is not None or hasattr(GenerationConfig(), name):
            setattr(generation_config, name, value)
        elif hasattr(generation_config, name):
            delattr(generation_config, name)
    defaults = default_options(config)
    if "confidence_top_k" in (config.generation_defaults or {}):
        # Dream's sampler reads `top_k` in greedy decoding as well.
        defaults["confidence_top_k"] = generation_config.top_k or defaults["confidence_top_k"]
    for name, value in defaults.items():
        if not hasattr(generation_config, name):
            setattr(generation_config, name, value)
    if generation_config.do_sample is None:
        # Pipelines draw tokens unless the model's configuration forbids it.
        generation_config.do_sample = False
    # Else transformers would not read our fields back from `generation_config.json`.
    generation_config._from_model_config = False
