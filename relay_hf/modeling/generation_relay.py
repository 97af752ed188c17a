"""`generate()` for masked diffusion, on transformers' own GenerationMixin.

The mixin checks the options and hands over to the block decoder. It overrides underscored methods of GenerationMixin,
which is how transformers itself specialises decoding; `tests/modeling/test_generation_contract.py` fails if they move.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerationMode, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from .cache_relay import RelayCache
from .choice_relay import TokenChooser
from .decoding_relay import BlockDecoder
from .defaults_relay import add_defaults
from .options_relay import (
    check_inputs,
    check_length,
    check_options,
    check_reference,
    check_user_arguments,
    drop_empty,
    fit_processors,
    policy_of,
    seeds_of_rows,
)
from .outputs_relay import RelayGenerateOutput
from .start_relay import make_start
from .versions_relay import CACHE_ARGUMENT, pop_cache


class RelayGenerationMixin(GenerationMixin):
    """Block diffusion decoding with the relay state in the cache.

    Options of `generate` beside the usual ones, with defaults in `model.generation_config`:

    - `unmasking_policy`: `"confidence_threshold"`, `"confidence_budget"`, `"fixed_count"`, `"time_schedule"` or
      `"entropy_bound"`;
    - `unmasking_threshold`: what the policy compares with;
    - `denoising_steps`: how many steps a block, or a sub-block, takes. `fixed_count` and `time_schedule` spread its
      positions over them, `confidence_threshold` reveals as many as they need in any case;
    - `unmasking_order`: which positions `fixed_count` and `time_schedule` reveal first. `"confidence"`: the most
      probable token; `"entropy"`: the least; `"margin"`: the greatest difference of the two best probabilities;
      `"left_to_right"`;
    - `confidence_top_k`: count only so many tokens of each distribution, the most probable ones, greedy or not;
    - `sub_block_size`: positions of a block that are revealed first, left to right; `None` = the whole block. On a
      canvas that text is appended to they are counted from the end of each row's prompt;
    - `use_sub_block_cache`: once a forward at a sub-block's start has computed the keys and values of the whole block,
      pass only the sub-block through the network. Faster and an approximation: the rest of the block is not told what
      is revealed meanwhile. `"prefix"` passes the sub-block and all that is behind it;
    - `fuse_commits`: commit a finished block in the first denoise forward of the next one, which saves a forward per
      block. That first forward then sees [MASK] in place of a token-shift model's first token of the block;
    - `use_relay`: carry the state between denoising steps;
    - `relay_start`: state of a block's first step. `None`: what `config.relay_initial_state` says; `"zeros"`:
      the channel applied to zeros; `"self"`: what one more denoise forward leaves, with nothing injected;
      `"dirichlet"`: random predictions; `"reference"`: the predictions of another model of the same tokens and blocks,
      given as `reference_model`. The last two are for channels that read distributions;
    - `t_max`, `t_min`: temperature at a block's first step, and the one it falls to linearly as the block is revealed;
    - `sampling_seeds`: one number per row of the output. A row draws the same tokens in any batch, on any device;
    - `output_history`: return, as `history`, which forward revealed which token (with `return_dict_in_generate=True`).

    `cache` of an earlier turn may be passed on for one conversation: blocks that both turns share are not
    computed again.

    A model with `block_size=None` fills in the masks of the given canvas, and of `max_new_tokens` more if asked for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        add_defaults(self.config, self.generation_config)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        # A file written by another library, or an object assigned by the user, may lack our fields.
        add_defaults(self.config, self.generation_config)
        check_user_arguments(kwargs)
        options, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        drop_empty(options)
        return options, model_kwargs

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching (also reached by `cache_implementation="paged"`) goes token by token."""
        raise ValueError("Continuous batching decodes left to right, which block diffusion does not: call `generate`.")

    @property
    def init_continuous_batching(self) -> Any:
        """Absent, which is what transformers' server looks at before it batches continuously."""
        raise AttributeError(f"{type(self).__name__} has no `init_continuous_batching`: call `generate`.")

    def _extract_generation_mode_kwargs(
        self, custom_generate: Any, kwargs: dict[str, Any], *args: Any, **others: Any
    ) -> dict[str, Any]:
        """Takes out the reference model, as transformers does other models: it is no argument of `forward`."""
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
        # Everything about our own options is said here, before any forward.
        check_options(self.config, generation_config)
        check_reference(self.config, generation_config, generation_mode_kwargs.get("reference_model"))

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
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation={generation_config.cache_implementation!r}` cannot hold the relay state: leave "
                "it out, and generate uses a `RelayCache`."
            )
        cache = pop_cache(model_kwargs)
        if cache is None:
            cache = RelayCache(config=self.config.text_config)
        if not isinstance(cache, RelayCache):
            raise ValueError(
                f"`cache` is a {type(cache).__name__}, which cannot hold the relay state: pass a `RelayCache`, or "
                "nothing."
            )
        if cache.get_seq_length() == 0:
            # A run that never committed a block leaves a relay state without keys and values.
            cache.reset()
        elif cache.tokens is not None:
            cache.drop_unfinished()
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
        attention_mask: Tensor | None = None,
        reference_model: Any = None,
        **model_kwargs: Any,
    ) -> RelayGenerateOutput | Tensor:
        """Decodes a batch; called by `generate`, whose documentation describes the arguments.

        Raises:
            ValueError: an option that block diffusion cannot honour.
        """
        cache: RelayCache = pop_cache(model_kwargs)
        # Set by `generate` for token-by-token decoding; positions and logits are the block decoder's own business.
        for name in ("position_ids", "logits_to_keep", "use_cache", "tokenizer"):
            model_kwargs.pop(name, None)
        if unused := sorted(name for name, value in model_kwargs.items() if value is not None):
            raise ValueError(f"`generate` does not take {unused}: leave them out.")
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"A streamer shows one row, but the batch has {len(input_ids)}: generate rows one by one.")
        carried = cache.tokens
        if cache.get_seq_length() and (carried is None or len(carried) != 1 or len(input_ids) != 1):
            raise ValueError(
                "`cache` holds a prefix of other rows: a cache is carried from turn to turn of one "
                "conversation, so pass one row, or `reset()` the cache."
            )
        new_tokens = generation_config.max_length - input_ids.shape[1]
        longest = input_ids.shape[1] if attention_mask is None else int(attention_mask.sum(-1).max())
        check_length(self.config, self.learned_positions, longest + new_tokens)
        processors = fit_processors(logits_processor, generation_config)
        policy = policy_of(generation_config)

        device = self.get_input_embeddings().weight.device
        seeds = seeds_of_rows(generation_config, len(input_ids)).to(device)
        decoder = BlockDecoder(
            self,
            cache,
            policy=policy,
            chooser=TokenChooser(processors, generation_config.do_sample, self.config.mask_token_id, policy.reads),
            seeds=seeds,
            sub_block_size=generation_config.sub_block_size,
            use_sub_block_cache=generation_config.use_sub_block_cache,
            fuse_commits=generation_config.fuse_commits,
            use_relay=generation_config.use_relay,
            start=make_start(generation_config.relay_start, seeds, reference_model),
            stop_token_ids=generation_config._eos_token_tensor,
            pad_token_id=generation_config._pad_token_tensor,
            # Length and stop tokens are the decoder's own.
            stopping_criteria=[c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)],
            streamer=streamer,
            output_history=generation_config.output_history,
        )
        with cache.undone_by_exceptions():
            output = decoder.run(
                input_ids.long().to(device),
                torch.ones_like(input_ids, device=device) if attention_mask is None else attention_mask.to(device),
                new_tokens=new_tokens,
            )
        return output if generation_config.return_dict_in_generate else output.sequences
