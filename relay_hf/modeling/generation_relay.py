"""`generate()` for masked diffusion, on transformers' own GenerationMixin.

The mixin checks the options and calls the block decoder. It overrides underscored methods of GenerationMixin, as
transformers itself specialises decoding; `tests/modeling/test_generation_contract.py` fails if these methods move.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer

from .cache_relay import RelayCache
from .configuration_relay import RelayConfig
from .generation_blocks_relay import BlockDecoder
from .generation_given_relay import GivenBatch, Prompts
from .generation_grid_relay import DecodingGrid
from .generation_options_relay import DecodingOptions, complete_generation_config
from .generation_processors_relay import check_counts, drop_empty
from .generation_start_relay import STARTS
from .generation_static_relay import StaticDecoder, step_compilation
from .generation_stopping_relay import Stopping
from .generation_tokens_relay import TokenChooser
from .outputs_relay import RelayGenerateOutput
from .versions_relay import CACHE_ARGUMENT, pop_cache

# Arguments that users may pass to `generate` beside its options.
INPUTS = {"input_ids", "attention_mask", "cache", "past_key_values"}


class RelayGenerationMixin(GenerationMixin):
    """Block diffusion decoding with the relay state in the cache.

    `generate` takes the options of `DecodingOptions` beside those of transformers; `model.generation_config` has their
    defaults. For one row, the `cache` of the conversation's last turn may be given: blocks that both turns share are
    not computed again. A model with `block_size=None` fills in the masks of the given canvas, and of `max_new_tokens`
    more positions if asked for.
    """

    @property
    def generation_config(self) -> GenerationConfig:
        """Options of `generate` where the caller gives none; setting it adds the options of block diffusion."""
        return self._generation_config

    @generation_config.setter
    def generation_config(self, generation_config: GenerationConfig) -> None:
        complete_generation_config(self.config, generation_config)
        self._generation_config = generation_config

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        check_counts(kwargs)
        options, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        drop_empty(options)
        return options, model_kwargs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(model_kwargs)
        # transformers passes on two of its options; `check_transformers_options` raises for them.
        taken = INPUTS | {"output_attentions", "output_hidden_states"}
        if unused := sorted(name for name, value in model_kwargs.items() if name not in taken and value is not None):
            raise ValueError(f"`generate` does not take {unused}: leave them out.")

    def block_decoder(self, *args: Any, **kwargs: Any) -> BlockDecoder:
        """What `generate` would run with the same arguments, prepared and checked, before its first forward.

        For those who decode rows of several calls together: see `BlockDecoder`, whose methods are called under
        `torch.no_grad()`.

        Raises:
            ValueError: as `generate`.
        """
        return self.generate(*args, custom_generate=make_decoder, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Raises a ValueError: continuous batching (also `cache_implementation="paged"`) goes token by token."""
        raise ValueError("Continuous batching decodes left to right, which block diffusion does not: call `generate`.")

    @property
    def init_continuous_batching(self) -> Any:
        """Raises an AttributeError, so that transformers' server, which looks for it, does not batch continuously."""
        raise AttributeError(f"{type(self).__name__} has no `init_continuous_batching`: call `generate`.")

    def _extract_generation_mode_kwargs(
        self, custom_generate: Any, kwargs: dict[str, Any], *args: Any, **others: Any
    ) -> dict[str, Any]:
        """Takes out the reference model, which is no argument of `forward`, as transformers takes out other models."""
        # What `make_decoder` gets is what `_sample` gets, where others would not get all of it.
        custom_generate = None if custom_generate is make_decoder else custom_generate
        taken = super()._extract_generation_mode_kwargs(custom_generate, kwargs, *args, **others)
        reference = kwargs.pop("reference_model", None)
        return taken if reference is None else {**taken, "reference_model": reference}

    def _validate_generation_mode(
        self,
        generation_mode: GenerationMode,
        generation_config: GenerationConfig,
        generation_mode_kwargs: dict[str, Any],
    ) -> None:
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(
                f"`generate` was asked for {generation_mode.value}, but block diffusion reveals tokens out of order: "
                "use greedy decoding or `do_sample=True`, with `num_beams=1` and without an assistant model."
            )
        if generation_mode_kwargs.get("synced_gpus"):
            raise ValueError("`synced_gpus=True` is not supported: gather the weights on one process to generate.")
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        # Parsed before any forward; `_sample` receives them.
        generation_mode_kwargs["options"] = DecodingOptions.of(
            self.config, generation_config, generation_mode_kwargs.get("reference_model")
        )

    def _prepare_model_inputs(
        self, inputs: Any, bos_token_id: Tensor | None, model_kwargs: dict[str, Any]
    ) -> tuple[Tensor, str | None, dict[str, Any]]:
        given = model_kwargs.get("input_ids") if inputs is None else inputs
        if given is not None and model_kwargs.get("inputs_embeds") is None:
            check_inputs(self.config, given, model_kwargs.get("attention_mask"))
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic", "static"):
            raise ValueError(
                f"`cache_implementation={generation_config.cache_implementation!r}` cannot hold the relay state: leave "
                "it out, and generate uses a `RelayCache`."
            )
        cache = pop_cache(model_kwargs)
        if cache is None:
            cache = RelayCache(config=self.config.text_config)
        if not isinstance(cache, RelayCache):
            kind = type(cache).__name__
            raise ValueError(f"`cache` is a {kind}, which cannot hold the relay state: pass a `RelayCache` or nothing.")
        is_one_row = batch_size * generation_config.num_return_sequences == 1
        if cache.get_seq_length() and not (is_one_row and cache.tokens is not None and len(cache.tokens) == 1):
            raise ValueError(
                "`cache` holds a prefix of other rows: a cache is carried from turn to turn of one conversation, so "
                "pass one row, or `reset()` the cache."
            )
        if cache.get_seq_length() == 0:
            # A `generate` that committed no block leaves a relay state without keys and values.
            cache.reset()
        model_kwargs[CACHE_ARGUMENT] = cache

    def _prepare_generated_length(
        self, generation_config: GenerationConfig, has_default_max_length: bool, **kwargs: Any
    ) -> GenerationConfig:
        if self.config.block_size is None and has_default_max_length and generation_config.max_new_tokens is None:
            # A canvas is filled in, nothing is appended.
            generation_config.max_length = kwargs["input_ids_length"]
            return generation_config
        return super()._prepare_generated_length(
            generation_config=generation_config, has_default_max_length=has_default_max_length, **kwargs
        )

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        if self.config.block_size is None and generation_config.max_length == input_ids_length:
            return
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> RelayGenerateOutput | Tensor:
        """Decodes a batch; called by `generate`, whose documentation describes the arguments.

        Raises:
            ValueError: an option does not fit the batch.
        """
        decoder = make_decoder(
            self, input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **model_kwargs
        )
        with decoder.cache.undone_by_exceptions():
            output = decoder.run()
        return output if generation_config.return_dict_in_generate else output.sequences


def make_decoder(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    attention_mask: Tensor | None = None,
    reference_model: Any = None,
    options: DecodingOptions | None = None,
    **model_kwargs: Any,
) -> BlockDecoder:
    """The decoder that decodes a batch; arguments as `generate` gives them to a decoding method.

    Raises:
        ValueError: an option does not fit the batch.
    """
    config, rows, new_tokens = model.config, len(input_ids), generation_config.max_length - input_ids.shape[1]
    options = options or DecodingOptions.of(config, generation_config, reference_model)
    if streamer is not None and rows > 1:
        raise ValueError(f"A streamer shows one row, but the batch has {rows}: generate rows one by one.")
    prompts = Prompts.read(input_ids, attention_mask, config.mask_token_id)
    check_length(config, model.learned_positions, max(prompts.lengths) + new_tokens)
    draws, device = generation_config.do_sample, model.get_input_embeddings().weight.device
    cache: RelayCache = pop_cache(model_kwargs)
    stopping = Stopping.of(generation_config, stopping_criteria, config.mask_token_id)
    batch = GivenBatch(prompts, stopping, streamer, options.output_history, config.mask_token_id, device)
    # Greedy decoding leaves torch's generator alone.
    seeds = options.seeds(rows) if draws else torch.zeros(rows, dtype=torch.long)
    is_static = generation_config.cache_implementation == "static"
    return (StaticDecoder if is_static else BlockDecoder)(
        model=model,
        cache=cache,
        grid=DecodingGrid(batch, seeds.to(device), new_tokens, config, options.sub_block_size),
        options=options,
        chooser=TokenChooser(options.processors(logits_processor), draws, config.mask_token_id, options.policy.reads),
        start=None if options.relay_start is None else STARTS[options.relay_start](reference_model),
        **({"compile_config": step_compilation(model, generation_config)} if is_static else {}),
    )


def check_inputs(config: RelayConfig, input_ids: Any, attention_mask: Any = None) -> None:
    """Raise a ValueError if prompts are not a batch of tokens.

    Args:
        config: configuration of the model.
        input_ids: (B, P) long, whatever the caller gave.
        attention_mask: (B, P), or None.

    Raises:
        ValueError: one of them is no tensor, the tokens are empty, of a wrong type or outside the vocabulary, or the
            shapes differ.
    """
    for name, given in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if not isinstance(given, Tensor) and given is not None:
            raise ValueError(f"`{name}` are a {type(given).__name__}: pass a tensor of shape (rows, positions).")
    if input_ids.ndim != 2:
        shape = tuple(input_ids.shape)
        raise ValueError(f"`input_ids` have shape {shape}: pass (rows, positions), `input_ids[None]` for one row.")
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
    """Raise a ValueError if a text is longer than a learned table of positions; warn if it exceeds the configured ones.

    Args:
        config: configuration of the model.
        learned_positions: rows of the table; None if positions are computed.
        length: positions of the longest row, prompt and new tokens.
    """
    limit = config.positions
    if limit is None or length <= limit:
        return
    if learned_positions is not None:
        raise ValueError(
            f"Prompt and new tokens take {length} positions, but the model has learned {limit}: shorten the prompt, or "
            "lower `max_new_tokens`."
        )
    # The message leaves out the length, so that Python shows it once, not once per length.
    warnings.warn(
        f"Prompt and new tokens take more positions than the {limit} of the model's `max_position_embeddings`, and "
        "what it writes there may be nonsense: shorten the prompt, or lower `max_new_tokens`.",
        stacklevel=2,
    )
