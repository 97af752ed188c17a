"""What `generate` refuses, in one sentence and before any forward; and logits processors in the form that it needs."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LinearTemperatureScheduleLogitsProcessor, LogitsProcessorList
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .channel_relay import CHANNELS
from .configuration_relay import RelayConfig
from .reveal_relay import UnmaskingPolicy, make_policy
from .start_relay import STARTS

# Those that follow the temperature in transformers' own order.
AFTER_TEMPERATURE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    MinPLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
# The only ones whose effect does not depend on the order in which tokens appear.
ORDER_FREE_PROCESSORS = (
    *AFTER_TEMPERATURE,
    InfNanRemoveLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
)
# Options of transformers that would change nothing, and why.
WITHOUT_EFFECT = {
    "output_scores": "every position is scored many times",
    "output_logits": "every position is scored many times",
    "output_attentions": "a block takes many forwards",
    "output_hidden_states": "a block takes many forwards",
    "penalty_alpha": "contrastive search goes token by token",
    "prefill_chunk_size": "the prompt is prefilled at once",
}


# What transformers refuses, or fails with, when it is empty.
MAY_BE_EMPTY = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "eos_token_id",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
)


# Greedy decoding of a checkpoint that may say how tokens are drawn, which `generate` would refuse.
GREEDY = {"do_sample": False, "t_max": None, "t_min": None, "sampling_seeds": None}


def check_user_arguments(given: dict[str, Any]) -> None:
    """Refuses arguments of the model's `forward` that `generate` sets itself.

    Args:
        given: what the caller passed by name.

    Raises:
        ValueError: there is one.
    """
    if unused := sorted({"position_ids", "logits_to_keep"} & {name for name in given if given[name] is not None}):
        raise ValueError(f"`generate` does not take {unused}: leave them out.")
    for name in ("max_new_tokens", "max_length", "num_return_sequences"):
        value = given.get(name)
        if value is not None and not (_is_number(value, int) and value >= 0):
            raise ValueError(f"`{name}={value!r}` is not a whole number >= 0: give one.")


def check_options(config: RelayConfig, options: GenerationConfig) -> None:
    """Refuses options that are of a wrong type, out of range, senseless together, or without effect.

    Args:
        config: the model's.
        options: the model's generation config, with the caller's options in it.

    Raises:
        ValueError: there is one.
    """
    _check_types(options)
    policy_of(options)
    block_size, sub_block_size = config.block_size, options.sub_block_size
    if sub_block_size is not None and (sub_block_size < 1 or (block_size and block_size % sub_block_size)):
        raise ValueError(
            f"`sub_block_size={sub_block_size}` does not divide the model's `block_size={block_size}`: choose a "
            "divisor; the block size itself stands for the whole block, as `None` does."
        )
    if options.use_sub_block_cache and sub_block_size is None:
        raise ValueError(
            f"`use_sub_block_cache={options.use_sub_block_cache}` has no sub-blocks to work with: also set "
            "`sub_block_size`."
        )
    if options.fuse_commits and block_size is None:
        raise ValueError("`fuse_commits=True` has no blocks to commit, the model has `block_size=None`: drop it.")
    _check_start(config, options)
    _check_sampling(options)
    _check_special_tokens(config, options)
    if options.output_history and not options.return_dict_in_generate:
        raise ValueError(
            "`output_history=True` has nowhere to go: also set `return_dict_in_generate=True`, and read `history`."
        )
    if options.use_cache is not None and not options.use_cache:
        raise ValueError(
            f"`use_cache={options.use_cache}` is not supported: the relay state lives in the cache; leave it on."
        )
    if isinstance(options.stop_strings, list | tuple) and "" in options.stop_strings:
        raise ValueError(
            f"`stop_strings={options.stop_strings!r}` holds an empty text, which stands everywhere: leave it out."
        )
    if options.num_return_sequences == 0:
        raise ValueError("`num_return_sequences=0` asks for nothing: give 1 or more.")
    for name, why in WITHOUT_EFFECT.items():
        if getattr(options, name, None) not in (None, False):
            raise ValueError(f"`{name}={getattr(options, name)!r}` has no effect, because {why}: leave it out.")
    if options.num_beam_groups not in (None, 1):
        raise ValueError(f"`num_beam_groups={options.num_beam_groups}` has no effect without beams: leave it out.")


def policy_of(options: GenerationConfig) -> UnmaskingPolicy:
    """The unmasking policy that the options describe.

    Raises:
        ValueError: they describe none.
    """
    return make_policy(
        options.unmasking_policy, options.unmasking_threshold, options.denoising_steps, options.unmasking_order
    )


def check_reference(config: RelayConfig, options: GenerationConfig, reference: Any) -> None:
    """Refuses a reference model that nobody reads, that is missing, or whose predictions mean something else.

    Args:
        config: the model's.
        options: the model's generation config, with the caller's options in it.
        reference: what was given as `reference_model`, or None.

    Raises:
        ValueError: there is one.
    """
    start = options.relay_start
    if reference is None:
        if start == "reference":
            raise ValueError("`relay_start='reference'` has no model to ask: also pass one as `reference_model`.")
        return
    if start != "reference":
        raise ValueError(
            f"`reference_model` is not asked with `relay_start={start!r}`: set `relay_start='reference'`, or leave the "
            "model out."
        )
    check_same_tokens(config, reference)


def check_same_tokens(config: RelayConfig, reference: Any) -> None:
    """Refuses a reference model whose predictions mean something else; its width and family may differ.

    Args:
        config: of the model that is to get them.
        reference: the model that makes them.

    Raises:
        ValueError: it is no model of this library, or predicts other tokens in other blocks.
    """
    other = getattr(reference, "config", None)
    if getattr(other, "model_type", None) != config.model_type:
        raise ValueError(
            f"`reference_model` is a {type(reference).__name__}, but must be a masked diffusion model of this library: "
            "pass a `RelayForMaskedDiffusion`, with `relay_channel='none'` if it has no channel."
        )
    ours = (config.text_config.vocab_size, config.mask_token_id, config.block_size)
    theirs = (other.text_config.vocab_size, other.mask_token_id, other.block_size)
    if ours != theirs:
        raise ValueError(
            f"`reference_model` has (vocabulary size, `mask_token_id`, `block_size`) = {theirs}, but this model has "
            f"{ours}: choose a reference of the same tokens and blocks."
        )


def check_inputs(config: RelayConfig, input_ids: Any, attention_mask: Any = None) -> None:
    """Refuses prompts that are not a batch of tokens.

    Args:
        config: the model's.
        input_ids: (B, P) long.
        attention_mask: (B, P), or None.

    Raises:
        ValueError: they are no tensors, empty, of a wrong type, outside the vocabulary, or of different shapes.
    """
    for name, given in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if not isinstance(given, Tensor) and given is not None:
            raise ValueError(f"`{name}` are a {type(given).__name__}: pass a tensor of shape (rows, positions).")
    if input_ids.ndim != 2:
        raise ValueError(
            f"`input_ids` have shape {tuple(input_ids.shape)}: pass (rows, positions), `input_ids[None]` for one."
        )
    if len(input_ids) == 0:
        raise ValueError("`input_ids` hold no row: give at least one prompt.")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"`input_ids` are of type {input_ids.dtype}, but tokens are whole numbers: pass ids.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, but `input_ids` {tuple(input_ids.shape)}: "
            "pass one number per token, 0 at padding."
        )
    vocab_size = config.text_config.vocab_size
    lowest, highest = torch.stack(input_ids.aminmax()).tolist() if input_ids.numel() else (0, 0)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"`input_ids` hold the token id {wrong}, but the model has {vocab_size} tokens: tokenize with the model's "
            "own tokenizer, or call `resize_token_embeddings`."
        )


def check_length(config: RelayConfig, learned_positions: int | None, length: int) -> None:
    """Refuses a text that is longer than a table of positions, and warns of one that is longer than the model knows.

    Args:
        config: the model's.
        learned_positions: rows of that table; None if positions are computed.
        length: positions of the longest row, prompt and new tokens.

    Raises:
        ValueError: the table ends before the text.
    """
    limit = config.positions
    if limit is None or length <= limit:
        return
    if learned_positions is not None:
        raise ValueError(
            f"Prompt and new tokens take {length} positions, but the model has learned {limit}: shorten the prompt, or "
            "lower `max_new_tokens`."
        )
    # Without the length: one warning, not one per text.
    warnings.warn(
        f"Prompt and new tokens take more positions than the {limit} of the model's `max_position_embeddings`, and "
        "what it writes there may be nonsense: shorten the prompt, or lower `max_new_tokens`.",
        stacklevel=2,
    )


def drop_empty(options: GenerationConfig) -> None:
    """An empty list, text or dictionary means "none", whichever option it is given for; changes `options` in place."""
    for name in MAY_BE_EMPTY:
        if getattr(options, name, None) in ([], (), "", {}):
            setattr(options, name, None)


def fit_processors(processors: LogitsProcessorList, options: GenerationConfig) -> LogitsProcessorList:
    """The processors as the block decoder calls them: a row per scored position, of any row of the batch.

    `confidence_top_k` becomes one of them.

    Raises:
        ValueError: one of transformers' reads the order of tokens.
    """
    fitted = LogitsProcessorList()
    for processor in processors:
        name = type(processor).__name__
        if isinstance(processor, SequenceBiasLogitsProcessor):
            if any(len(sequence) > 1 for sequence in processor.sequence_bias):
                raise ValueError(
                    f"{name} works on single tokens only, because block diffusion reveals tokens out of order: leave "
                    "out sequences of several."
                )
        elif isinstance(processor, RepetitionPenaltyLogitsProcessor):
            if isinstance(processor.prompt_ignore_length, int):
                raise ValueError(f"{name} cannot ignore a part of the prompt: leave out `prompt_ignore_length`.")
            # transformers tells it how much padding each row of the batch has; what we show it has none.
            processor = RepetitionPenaltyLogitsProcessor(processor.penalty)
        elif type(processor).__module__.startswith("transformers.") and not isinstance(
            processor, ORDER_FREE_PROCESSORS
        ):
            raise ValueError(
                f"{name} is not supported, because block diffusion reveals tokens out of order: remove the option "
                "that adds it."
            )
        fitted.append(processor)
    if options.confidence_top_k is not None:
        fitted.append(TopKLogitsWarper(options.confidence_top_k))
    if options.t_max is not None:
        place = next((i for i, p in enumerate(fitted) if isinstance(p, AFTER_TEMPERATURE)), len(fitted))
        fitted.insert(place, LinearTemperatureScheduleLogitsProcessor(options.t_min, options.t_max, 1))
    return fitted


def seeds_of_rows(options: GenerationConfig, rows: int) -> Tensor:
    """(B,) long; by default from torch's own generator, which `torch.manual_seed` sets, or 0 if tokens are not drawn.

    Raises:
        ValueError: there is not one for every row.
    """
    seeds = options.sampling_seeds
    if seeds is None:
        # Greedy decoding may draw the start of the relay state, and is to say the same every time.
        return torch.randint(2**62, (rows,)) if options.do_sample else torch.zeros(rows, dtype=torch.long)
    if len(seeds) != rows:
        raise ValueError(f"`sampling_seeds` has {len(seeds)} numbers for {rows} rows: give one per returned row.")
    return torch.tensor(seeds, dtype=torch.long)


def _check_types(options: GenerationConfig) -> None:
    """transformers takes any value for fields that it does not know, and for some that it does."""
    cached = options.use_sub_block_cache
    if not isinstance(cached, bool) and cached != "prefix":
        raise ValueError(f"`use_sub_block_cache={cached!r}` must be True or False, or 'prefix'.")
    for name in ("fuse_commits", "use_relay", "output_history", "do_sample"):
        if not isinstance(value := getattr(options, name), bool):
            raise ValueError(f"`{name}={value!r}` must be True or False.")
    if not _is_number(size := options.sub_block_size, int):
        raise ValueError(f"`sub_block_size={size!r}` is not a whole number: give one, or `None` for the whole block.")
    if not _is_number(best := options.confidence_top_k, int) or (best is not None and best < 2):
        # One token alone would be certain, and could be [MASK].
        raise ValueError(f"`confidence_top_k={best!r}` is not a whole number >= 2: give one, or `None` for all tokens.")
    for name in ("t_max", "t_min"):
        if not _is_number(value := getattr(options, name), int | float):
            raise ValueError(f"`{name}={value!r}` is not a number: give a temperature.")
    seeds = options.sampling_seeds
    if seeds is not None and not (
        isinstance(seeds, list) and all(type(seed) is int and -(2**63) <= seed < 2**63 for seed in seeds)
    ):
        raise ValueError(
            f"`sampling_seeds={seeds!r}` is not a list of whole numbers of 64 bits: give one per returned row."
        )


def _is_number(value: Any, kind: Any) -> bool:
    return value is None or (isinstance(value, kind) and not isinstance(value, bool))


def _check_start(config: RelayConfig, options: GenerationConfig) -> None:
    start, channel = options.relay_start, config.relay_channel
    if start is None:
        return
    if not isinstance(start, str) or start not in STARTS:
        raise ValueError(
            f"`relay_start={start!r}` is unknown: choose one of {sorted(STARTS)}, or `None` for what the configuration "
            "says."
        )
    if not options.use_relay:
        raise ValueError(f"`relay_start={start!r}` starts a state, but `use_relay=False`: leave one of them out.")
    if channel == "none":
        raise ValueError(f"`relay_start={start!r}` starts a state, but the model has none to carry: leave it out.")
    if start == "zeros" and channel == "soft_mask":
        raise ValueError(
            "`relay_start='zeros'` has no meaning for `relay_channel='soft_mask'`, which would take zeros for a sure "
            "prediction: choose another, or `None`, which injects nothing."
        )
    if STARTS[start].makes_predictions and not CHANNELS[channel].reads_distribution:
        raise ValueError(
            f"`relay_start={start!r}` makes a state of predictions, but `relay_channel={channel!r}` carries hidden "
            "states: choose 'zeros' or 'self'."
        )


def _check_sampling(options: GenerationConfig) -> None:
    hottest, coldest, seeds = options.t_max, options.t_min, options.sampling_seeds
    if hottest is not None and not options.do_sample:
        raise ValueError("`t_max` is about drawing tokens, but decoding is greedy: also set `do_sample=True`.")
    if seeds is not None and not options.do_sample and options.relay_start != "dirichlet":
        raise ValueError(
            "`sampling_seeds` is about drawing tokens or the relay state, but nothing is drawn: also set "
            "`do_sample=True` or `relay_start='dirichlet'`."
        )
    if options.do_sample and isinstance(options.top_p, int | float) and options.top_p > 1:
        # transformers would leave it out without a word.
        raise ValueError(f"`top_p={options.top_p}` is not a probability: give one in [0, 1], or leave it out.")
    if (hottest is None) != (coldest is None):
        raise ValueError("`t_max` and `t_min` are the two ends of one schedule: give both, or neither.")
    if hottest is not None and not math.inf > hottest >= coldest > 0:
        raise ValueError(f"`t_max={hottest}` and `t_min={coldest}` must be temperatures with t_max >= t_min > 0.")
    if hottest is not None and options.temperature not in (None, 1.0):
        raise ValueError(
            f"`temperature={options.temperature}` and `t_max={hottest}` both set the temperature: give one."
        )


def _check_special_tokens(config: RelayConfig, options: GenerationConfig) -> None:
    stops = options.eos_token_id if isinstance(options.eos_token_id, list) else [options.eos_token_id]
    for name, tokens in (("eos_token_id", stops), ("pad_token_id", [options.pad_token_id])):
        for token in tokens:
            if token is not None and not (_is_number(token, int) and 0 <= token < config.text_config.vocab_size):
                raise ValueError(
                    f"`{name}={token!r}` is not one of the model's {config.text_config.vocab_size} tokens: give the "
                    "tokenizer's."
                )
    if config.mask_token_id in stops:
        raise ValueError(f"`eos_token_id={config.mask_token_id}` is [MASK], which is never written: give another.")
