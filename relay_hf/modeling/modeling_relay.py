"""RelayForMaskedDiffusion: a transformers backbone, a relay channel and a head.

Noise belongs to the trainer, loops to trainer and generation, attention to the backbone.

Legend: B rows, P positions before the forward, L positions of the forward, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import can_return_tuple

from .attention_blocks_relay import BLOCK_ATTENTION
from .attention_relay import (
    align_to_positions,
    attend_without_causality,
    block_attention_mask,
    full_attention,
    new_positions,
)
from .cache_relay import RelayCache, prefix_of
from .cache_static_relay import Rooms
from .channel_relay import ChannelPart, in_scope
from .configuration_relay import RelayConfig
from .generation_relay import RelayGenerationMixin
from .head_relay import RelayHead, best_token, is_plain, kept_labels, kept_positions, score
from .loading_adapters_relay import complete_adapter, loaded_adapter, merge_adapter, put_adapter, split_adapter
from .loading_backbones_relay import check_attention, check_backbone, embedding_name, learned_positions
from .loading_families_relay import FOREIGN_PARAMETER_NAMES, check_whole
from .loading_files_relay import check_json_files, explained
from .outputs_relay import Readings, RelayOutput
from .prefix_relay import Prefix
from .versions_relay import (
    as_cache_argument,
    checkpointing_drops_caches,
    hidden_states_request,
    takes_past_key_values,
)


class RelayForMaskedDiffusion(RelayGenerationMixin, PreTrainedModel):
    """Masked diffusion language model that carries a learned state between denoising steps (arXiv 2605.22967).

    `model` is an unchanged backbone of transformers, so parameter names are those of the base checkpoint; `relay` is
    the channel and `lm_head` the head. All three Auto classes for language models return this class.

    Raises:
        ValueError: the configuration has no `mask_token_id`, the backbone lacks what block diffusion needs, or the
            attention implementation is given no masks.
    """

    config: RelayConfig
    config_class = RelayConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["cache"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _keep_in_fp32_modules_strict = ["relay"]
    # The loss is the mean of its batch; `**kwargs` in `forward` would make Trainer believe that it was scaled already.
    accepts_loss_kwargs = False
    # A backbone without a channel, or with a fresh one, is a normal checkpoint to start from.
    _keys_to_ignore_on_load_missing = [r"^relay\."]
    _missing_when_loaded: list[str] = []

    def __init__(self, config: RelayConfig) -> None:
        for each in (config, config.text_config):
            check_attention(each._attn_implementation)
        has_choice = config.text_config._attn_implementation is not None
        super().__init__(config)
        if config.mask_token_id is None:
            raise ValueError(
                "`mask_token_id` is not set: let `relay_hf.convert(source, output)` add a [MASK] to a plain decoder "
                "and its tokenizer, or give the id of a token that no text uses."
            )
        # torch's default dtype, which the head gets too: the backbone must not follow a dtype in `text_config`.
        self.model = AutoModel.from_config(config.text_config, dtype=torch.get_default_dtype())
        check_backbone(config.text_config, self.model)
        if not has_choice and self.model.config._attn_implementation == "sdpa":  # transformers' own choice
            self.set_attn_implementation(BLOCK_ATTENTION)
        attend_without_causality(self.model)
        # Rows of a table of positions; None where positions are computed, as rotary ones are.
        self.learned_positions = learned_positions(self.model)
        self._tied_weights_keys = {"lm_head.weight": f"model.{embedding_name(self.model)}.weight"}
        self.relay = config.channel_class(config)
        self.lm_head = RelayHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # Index among the backbone's hidden states (0 = embeddings), or None for the output of its final norm.
        layers = config.text_config.num_hidden_layers
        self._state_index = None if config.relay_readout == "post_norm" else config.relay_layer % layers + 1
        self.static_rooms = Rooms()
        self.post_init()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """`is_activation_checkpointing` of transformers 5.24 under the name that PEFT asks for, without a warning."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ChannelPart):
            module.reset_parameters()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> "RelayForMaskedDiffusion":
        """Loads our checkpoints, published relay ones, Fast-dLLM v2, SDAR, LLaDA, Dream and plain causal decoders.

        Relay options (`mask_token_id`, `block_size`, `relay_channel`, ...) may be given as keyword arguments. The name
        of an adapter that our trainer saved, or `push` uploaded, loads its base and puts the adapter on it.

        Raises:
            ValueError: the configuration fits no relay model, a part of the weights is missing (an untrained channel
                may be), or the head has a bias.
            OSError: a file is missing, damaged, or of another model.
            ImportError: the checkpoint is an adapter, and `peft` is not installed.
        """
        check_json_files(pretrained_model_name_or_path)
        source, kwargs, adapter = split_adapter(cls.config_class, pretrained_model_name_or_path, kwargs)
        kwargs["key_mapping"] = {**FOREIGN_PARAMETER_NAMES, **(kwargs.get("key_mapping") or {})}
        wants_info = kwargs.pop("output_loading_info", False)
        with explained(source, "weights"):
            loaded: Any = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        check_whole(source, model.config, model._missing_when_loaded, kwargs)
        if "lm_head.bias" in info["unexpected_keys"]:
            raise ValueError(
                "The checkpoint's head has a bias (`lm_head.bias`), for which a relay model has no place: choose a "
                "model without one."
            )
        # The files of bidirectional models forbid a cache; ours always decodes with one.
        model.generation_config.use_cache = True
        if adapter is not None:
            model.load_adapter(**adapter)
        return loaded if wants_info else model

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        # `output_loading_info` leaves out all names that may be missing, but a channel may be missing only as a whole.
        # `tests/modeling/test_whole_checkpoints.py` fails if this moves.
        self._missing_when_loaded = sorted(loading_info.missing_keys)
        super()._adjust_missing_and_unexpected_keys(loading_info)

    def save_pretrained(
        self, save_directory: Any, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> None:
        """As in transformers, but always under our parameter names, wherever the checkpoint came from.

        If an adapter was loaded, only the adapter is written, with the configuration of the relay model.
        """
        adapter = loaded_adapter(self)
        if adapter is None:
            super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)
        elif kwargs.get("is_main_process", True):
            adapter.save_pretrained(save_directory)
            complete_adapter(self, save_directory)

    def load_adapter(
        self, peft_model_id: Any, adapter_name: str = "default", adapter_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Loads an adapter through PEFT, trainable; transformers' own loader needs a PEFT that is not released yet.

        Args:
            peft_model_id: folder or Hub id.
            adapter_name: what PEFT is to call it.
            adapter_kwargs: arguments about where and how to download.

        Raises:
            ValueError: a part of the adapter is missing, has no place in the model or another size; or the adapter
                learns prompts.
        """
        put_adapter(self, peft_model_id, adapter_name, adapter_kwargs or {})

    def merge_and_unload(self, **kwargs: Any) -> "RelayForMaskedDiffusion":
        """Merges a loaded adapter into the weights; arguments of PEFT's method of that name.

        Returns:
            The model itself, without an adapter.

        Raises:
            ValueError: no adapter was loaded.
        """
        return merge_adapter(self, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers.

        Raises:
            ValueError: [MASK] would lose its row.
        """
        if new_num_tokens is not None and new_num_tokens <= self.config.mask_token_id:
            raise ValueError(
                f"`new_num_tokens={new_num_tokens}` leaves no row for [MASK], whose id is {self.config.mask_token_id}: "
                f"keep at least {self.config.mask_token_id + 1}."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As in transformers.

        Raises:
            ValueError: an implementation cannot follow the pattern of block diffusion; nothing is changed.
        """
        for name in attn_implementation.values() if isinstance(attn_implementation, dict) else [attn_implementation]:
            check_attention(name)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Takes any linear layer without bias; `resize_token_embeddings` makes a plain one."""
        if not isinstance(new_embeddings, RelayHead):
            head = RelayHead(new_embeddings.in_features, new_embeddings.out_features, bias=False, device="meta")
            head.weight = new_embeddings.weight
            new_embeddings = head
        super().set_output_embeddings(new_embeddings)

    @takes_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        relay_state: Tensor | None = None,
        relay_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | tuple[Tensor, Tensor] = 0,
        targets: Tensor | None = None,
        z_loss: float = 0.0,
        unscored: bool = False,
        output_relay_state: bool = True,
        **kwargs: Any,
    ) -> RelayOutput:
        """One pass of the network under block-causal attention. Never adds noise.

        Args:
            input_ids: (B, L) tokens, some of them [MASK].
            attention_mask: (B, P + L) with 0 at padding; or a prepared 4-D mask.
            position_ids: (B or 1, L); by default counted from the attention mask and the cache.
            cache: a `RelayCache` of whole committed blocks, to which the new positions are committed; or a prefix of
                one (`cache.prefix()`), which the new positions see and do not change.
            inputs_embeds: (B, L, D) embeddings of `input_ids`, if they have been looked up already.
            relay_state: (B, L, `config.relay_state_width`) position-aligned state of the previous step. `None` injects
                nothing at all; zeros is the channel applied to zeros.
            relay_mask: (B, L) bool, positions that receive the state instead of those of `config.relay_scope`.
            labels: (B, L) tokens, -100 = ignore; the loss is their mean cross-entropy.
            use_cache: store keys and values even if no cache was given.
            logits_to_keep: positions that go through the head: the last n (0 = all), indices, a (B, L) bool mask, or
                the rows and columns of N positions, (N,) each, which unlike a mask need not wait for the device.
            targets: (B, L) tokens, instead of `labels`. Kept positions are then scored in tiles, and their losses and
                confidences returned in place of logits: what training needs, without a vocabulary of numbers for each.
            z_loss: with `targets`, how much of log(sum(exp(logits)))^2 each loss includes.
            unscored: return the head's inputs at the kept positions in place of logits; greedy decoding passes them to
                `best_tokens`.
            output_relay_state: return the state for the next step; without it, channels that read distributions save
                the work of making it.

        Raises:
            ValueError: a shape does not fit, the cache cannot align the first position, all labels are -100, or the
                text is longer than the backbone's table of positions.
        """
        if input_ids is None:
            raise ValueError("`inputs_embeds` do not say which positions are masked: pass `input_ids` as well.")
        if use_cache and cache is None:
            cache = RelayCache(config=self.config.text_config)
        prefix = prefix_of(cache)
        prefix.check_rows(len(input_ids))
        if cache is not None:
            self._check_prefix(prefix, logits_to_keep)
        labelled = None if labels is None else kept_labels(labels, input_ids, logits_to_keep)
        if position_ids is None:
            position_ids = new_positions(attention_mask, prefix.length, input_ids.shape[1], input_ids.device)
        limit = self.learned_positions
        # The length is compared first, because reading positions waits for the device.
        if limit is not None and prefix.length + input_ids.shape[1] > limit and int(position_ids.max()) >= limit:
            raise ValueError(
                f"`input_ids` reach position {int(position_ids.max())}, but the backbone has learned {limit} "
                "positions: shorten the text."
            )

        if inputs_embeds is None:
            inputs_embeds = prefix.look_up(self.get_input_embeddings(), input_ids)
        embeds = inputs_embeds
        if relay_state is not None:
            receives = relay_mask if relay_mask is not None else self.receives_state(input_ids)
            embeds = self.relay(embeds, receives, relay_state)

        pattern = block_attention_mask(self.model.config, embeds, attention_mask, prefix, self.config.block_size)
        backbone_output = self.model(
            inputs_embeds=embeds,
            attention_mask=full_attention(embeds) if pattern is None else pattern,
            position_ids=position_ids,
            **as_cache_argument(None if cache is None else prefix),
            # Layers write to the cache either way; in training, the backbone need not return it.
            use_cache=cache is not None and not self.training,
            **self._read_out_request(kwargs),
        )
        hidden, read_out = self._align(backbone_output, position_ids, prefix)
        if isinstance(cache, RelayCache):
            cache.commit(prefix, input_ids)
        return RelayOutput(
            **self._score(kept_positions(hidden, logits_to_keep), logits_to_keep, labelled, targets, unscored, z_loss),
            relay_state=self._next_state(read_out, hidden, input_ids, prefix) if output_relay_state else None,
            inputs_embeds=inputs_embeds,
            cache=cache,
            hidden_states=backbone_output.hidden_states if self._asks_for_hidden_states(kwargs) else None,
            attentions=backbone_output.attentions,
        )

    def _next_state(self, read_out: Tensor, hidden: Tensor, input_ids: Tensor, prefix: Prefix) -> Tensor | None:
        seen = prefix.rows_for_channel(read_out, hidden, input_ids == self.config.mask_token_id)
        return self.relay.next_state(Readings(*seen, self.lm_head, self.get_input_embeddings(), prefix.masks))

    def _score(
        self,
        kept: Tensor,
        logits_to_keep: int | Tensor | tuple[Tensor, Tensor],
        labelled: Tensor | None,
        targets: Tensor | None,
        unscored: bool,
        z_loss: float,
    ) -> dict[str, Tensor]:
        """Output fields of the kept positions, (N, D) or (B, n, D): logits and a loss, or what replaces them."""
        if unscored:
            return {"head_inputs": kept}
        if targets is not None:
            chosen = kept_positions(targets[..., None], logits_to_keep).flatten()
            losses, confidence = score(self.lm_head, kept.flatten(0, -2), chosen, self.config.mask_token_id, z_loss)
            return {"token_losses": losses, "confidence": confidence}
        logits = self.lm_head(kept)
        loss = {} if labelled is None else {"loss": F.cross_entropy(logits.flatten(0, -2).float(), labelled)}
        return {"logits": logits, **loss}

    def best_tokens(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) inputs of the head -> (N,) fp32 probability of the best token that is not [MASK], and (N,) token."""
        mask_token_id = self.config.mask_token_id
        if is_plain(self.lm_head, RelayHead):
            return self.lm_head(hidden, mask_token_id=mask_token_id)
        return best_token(self.lm_head(hidden), mask_token_id)

    def deciding_logits(self, hidden: Tensor) -> Tensor:
        """(N, D) inputs of the head -> (N, V) logits to decide by, without gradient.

        They are fp32 in a model of half precision, where those of `forward` are rounded; a head that is more than a
        weight (an adapter, a quantised one) gives its own.
        """
        if is_plain(self.lm_head, RelayHead):
            return self.lm_head(hidden, deciding=True)
        return self.lm_head(hidden)

    def receives_state(self, input_ids: Tensor) -> Tensor:
        """(B, L) bool, positions that the state enters under `config.relay_scope`."""
        return in_scope(self.config, input_ids == self.config.mask_token_id)

    def initial_relay_state(self, rows: int, length: int) -> Tensor | None:
        """State of the first denoising step of `rows` x `length` positions, or None if nothing is to be injected."""
        return self.relay.initial_state(rows, length, self.device)

    def _check_prefix(self, prefix: Prefix, logits_to_keep: Any) -> None:
        """Raise a ValueError if the forward cannot use the cache that it was given."""
        if checkpointing_drops_caches(self) and not prefix.can_replay:
            raise ValueError(
                "Gradient checkpointing drops keys and values while training, so a cache would stay empty: call "
                "`model.eval()`, or leave the cache out."
            )
        scores_nothing = isinstance(logits_to_keep, Tensor) and logits_to_keep.numel() == 0
        if prefix.length and self.config.token_shift and prefix.before is None and not scores_nothing:
            raise ValueError(
                "The cache holds a prefix but not the hidden state at its end, which a token-shift model needs to "
                "align the next block: use a `RelayCache`, and commit a block after `crop`."
            )

    def _asks_for_hidden_states(self, kwargs: dict[str, Any]) -> bool | int | list[int]:
        """The hidden states that the caller, else the configuration, asks for."""
        asked = kwargs.get("output_hidden_states")
        return bool(self.config.output_hidden_states) if asked is None else asked

    def _read_out_request(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments that ask the backbone for the layer that the channel reads, beside those of the caller."""
        layers = self._asks_for_hidden_states(kwargs)
        if self._state_index is not None and layers is not True:
            others = [] if not layers else [layers] if isinstance(layers, int) else list(layers)
            layers = [*others, self._state_index]
        return {**kwargs, "output_hidden_states": hidden_states_request(layers)}

    def _align(self, output: Any, position_ids: Tensor, prefix: Prefix) -> tuple[Tensor, Tensor]:
        """Position-aligned inputs of head and channel, both (B, L, D); the prefix takes the raw ones."""
        hidden = output.last_hidden_state
        read_out = hidden if self._state_index is None else output.hidden_states[self._state_index]
        prefix.take(hidden, read_out)
        if not self.config.token_shift:
            return hidden, read_out
        aligned = align_to_positions(hidden, position_ids, prefix.before, prefix.takes_before)
        if read_out is hidden:  # with `relay_readout="post_norm"`
            return aligned, aligned
        return aligned, align_to_positions(read_out, position_ids, prefix.read_out_before, prefix.takes_before)
