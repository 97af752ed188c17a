"""Options of transformers' own that block diffusion cannot honour, and logits processors in the form that it needs."""

from typing import Any

from transformers import GenerationConfig, LogitsProcessorList, generation
from transformers.generation import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from .configuration_relay import RelayConfig

# The warpers that follow the temperature in transformers' own order.
AFTER_TEMPERATURE = (
    generation.EpsilonLogitsWarper, generation.EtaLogitsWarper, generation.LogitNormalization,
    generation.MinPLogitsWarper, generation.TopHLogitsWarper, generation.TopKLogitsWarper, generation.TopPLogitsWarper,
    generation.TypicalLogitsWarper,
)  # fmt: skip
# The only processors whose effect does not depend on the order in which tokens appear.
ORDER_FREE_PROCESSORS = (
    *AFTER_TEMPERATURE, generation.InfNanRemoveLogitsProcessor, RepetitionPenaltyLogitsProcessor,
    generation.SuppressTokensLogitsProcessor, generation.TemperatureLogitsWarper,
)  # fmt: skip
# Options that would change nothing, and the reason.
WITHOUT_EFFECT = {
    "output_scores": "every position is scored many times",
    "output_logits": "every position is scored many times",
    "output_attentions": "a block takes many forwards",
    "output_hidden_states": "a block takes many forwards",
    "penalty_alpha": "contrastive search goes token by token",
    "prefill_chunk_size": "the prompt is prefilled at once",
}
# Options that transformers refuses, or fails with, when they are empty.
MAY_BE_EMPTY = ("bad_words_ids", "begin_suppress_tokens", "eos_token_id", "sequence_bias", "stop_strings",
                "suppress_tokens")  # fmt: skip


def drop_empty(generation_config: GenerationConfig) -> None:
    """Sets empty lists, texts and dictionaries to None, in place."""
    for name in MAY_BE_EMPTY:
        if getattr(generation_config, name, None) in ([], (), "", {}):
            setattr(generation_config, name, None)


def check_counts(arguments: dict[str, Any]) -> None:
    """Raise a ValueError if a number of tokens or rows is no whole number >= 0.

    transformers would first compare it with other numbers, and fail with an error that does not name it.
    """
    for name in ("max_new_tokens", "max_length", "num_return_sequences"):
        value = arguments.get(name)
        if value is not None and not (type(value) is int and value >= 0):
            raise ValueError(f"`{name}={value!r}` is not a whole number >= 0: give one.")


def check_transformers_options(config: RelayConfig, options: GenerationConfig) -> None:
    """Raise a ValueError if an option of transformers' own is out of range or has no effect.

    Args:
        config: configuration of the model.
        options: all options of one `generate`.
    """
    if not isinstance(options.do_sample, bool):
        raise ValueError(f"`do_sample={options.do_sample!r}` must be True or False.")
    if options.use_cache is not None and not options.use_cache:
        raise ValueError(f"`use_cache={options.use_cache}` is not supported: the cache holds the state; leave it on.")
    if isinstance(options.stop_strings, list | tuple) and "" in options.stop_strings:
        texts = options.stop_strings
        raise ValueError(f"`stop_strings={texts!r}` holds an empty text, which every text contains: leave it out.")
    if options.num_return_sequences == 0:
        raise ValueError("`num_return_sequences=0` asks for nothing: give 1 or more.")
    if options.do_sample and isinstance(options.top_p, int | float) and options.top_p > 1:
        # transformers would ignore it silently.
        raise ValueError(f"`top_p={options.top_p}` is not a probability: give one in [0, 1], or leave it out.")
    for name, why in WITHOUT_EFFECT.items():
        if getattr(options, name, None) not in (None, False):
            raise ValueError(f"`{name}={getattr(options, name)!r}` has no effect, because {why}: leave it out.")
    if options.num_beam_groups not in (None, 1):
        raise ValueError(f"`num_beam_groups={options.num_beam_groups}` has no effect without beams: leave it out.")
    _check_special_tokens(config, options)


def _check_special_tokens(config: RelayConfig, options: GenerationConfig) -> None:
    size = config.text_config.vocab_size
    stops = options.eos_token_id if isinstance(options.eos_token_id, list) else [options.eos_token_id]
    for name, tokens in (("eos_token_id", stops), ("pad_token_id", [options.pad_token_id])):
        for token in tokens:
            if token is not None and not (type(token) is int and 0 <= token < size):
                raise ValueError(f"`{name}={token!r}` is not one of the model's {size} tokens: give the tokenizer's.")
    if config.mask_token_id in stops:
        raise ValueError(f"`eos_token_id={config.mask_token_id}` is [MASK], which is never written: give another.")


def fit_processors(processors: LogitsProcessorList) -> LogitsProcessorList:
    """The processors in the form that the block decoder calls: each row of scores is one position, of any row.

    Raises:
        ValueError: a processor of transformers reads the order of tokens.
    """
    fitted = LogitsProcessorList()
    for processor in processors:
        name = type(processor).__name__
        if isinstance(processor, SequenceBiasLogitsProcessor):
            if any(len(sequence) > 1 for sequence in processor.sequence_bias):
                raise ValueError(f"{name} works on single tokens only, as order is free: leave out longer sequences.")
        elif isinstance(processor, RepetitionPenaltyLogitsProcessor):
            if isinstance(processor.prompt_ignore_length, int):
                raise ValueError(f"{name} cannot ignore a part of the prompt: leave out `prompt_ignore_length`.")
            # Without the padding of the batch's rows, which transformers gave it: each row of scores is one position.
            processor = RepetitionPenaltyLogitsProcessor(processor.penalty)
        elif type(processor).__module__.startswith("transformers.") and not isinstance(
            processor, ORDER_FREE_PROCESSORS
        ):
            raise ValueError(
                f"{name} is not supported, it reads an order of tokens: leave out the option that adds it."
            )
        fitted.append(processor)
    return fitted
