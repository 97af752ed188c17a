"""RelayConfig: every switch that changes what a relay model computes."""

import copy
import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .channel_relay import CHANNELS, Channel
from .loading_backbones_relay import check_backbone
from .loading_families_relay import foreign_config_to_relay
from .versions_relay import BackboneHolderConfig

# Fields of a backbone that must be at least 1.
COUNTS = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "max_position_embeddings"}  # fmt: skip


@strict
class RelayConfig(BackboneHolderConfig):
    r"""Configuration of a masked diffusion language model with a relay channel (arXiv 2605.22967).

    The transformer itself is described by `text_config`, any decoder configuration of transformers.

    Args:
        text_config: configuration (or its dictionary, with `model_type`) of the backbone. Default: Qwen2.
        block_size: number of positions that are denoised together; blocks see themselves and all blocks before them.
            `None`: the whole sequence is one block (LLaDA, Sudoku), every position sees every other.
        mask_token_id: id of [MASK]. Needed to build a model.
        token_shift: the raw head at position i scores the token at i + 1 (Fast-dLLM v2, Dream). The model hides this:
            its logits and states are position-aligned either way.
        tie_word_embeddings: share the embedding and the head; `None` follows `text_config`.
        relay_channel: what is carried from one denoising step to the next. `"none"`: nothing. `"layer_norm"`: a hidden
            state, added to the embeddings through a LayerNorm (Relay). `"residual_context"`: the expected embedding
            under the prediction, weighted by its normalised entropy (RCD, arXiv 2601.22954). `"soft_mask"`: the
            expected embedding of the best predictions, weighted by their certainty (arXiv 2510.17206). Or the name of a
            channel that was added by `register_channel`. The fields about a hidden state or a LayerNorm concern
            `"layer_norm"` alone.
        relay_layer: decoder layer whose output is carried; negative counts from the end, -1 = last.
        relay_readout: `"post_norm"` carries the output of the final norm (needs the last layer), `"pre_norm"` the raw
            residual stream.
        relay_scope: positions that receive the state: `"masked"` ones or `"all"`.
        relay_init: initial weight of the channel's LayerNorm; `"zeros"` makes a fresh channel an exact no-op.
        relay_initial_state: state of the first denoising step, in training and in decoding alike. `"zeros"`: the
            channel applied to zeros. `"none"`: nothing is added; `"soft_mask"` has no other.
        relay_norm_eps: epsilon of the channel's LayerNorm.
        relay_temperature: temperature of the distribution whose entropy is the weight in `"residual_context"`.
        relay_top_k: number of predictions that `"soft_mask"` mixes.
        relay_options: options that a registered channel declares, by their names.
        generation_defaults: defaults of `generate` for options of block diffusion, where they differ from those of
            `DecodingOptions`, as in checkpoints of other families; `generation_config` takes precedence.

    Raises:
        ValueError: a field has a value that no model can be built from.
    """

    model_type = "relay"
    keys_to_ignore_at_inference = ["cache", "relay_state", "inputs_embeds"]

    text_config: Any = None  # configuration, dictionary or None; a configuration after `__init__`
    block_size: int | None = 32
    mask_token_id: int | None = None
    token_shift: bool = False
    tie_word_embeddings: bool | None = None
    relay_channel: str = "layer_norm"
    relay_layer: int = -1
    relay_readout: Literal["post_norm", "pre_norm"] = "post_norm"
    relay_scope: Literal["masked", "all"] = "masked"
    relay_init: Literal["zeros", "ones"] = "zeros"
    relay_initial_state: Literal["zeros", "none"] = "zeros"
    relay_norm_eps: float = 1e-5
    relay_temperature: float = 1.0
    relay_top_k: int = 3
    relay_options: dict[str, Any] | None = None
    generation_defaults: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        misspelled = sorted(name for name in kwargs if name.startswith("relay_"))
        if misspelled:
            raise ValueError(f"Unknown relay option(s) {misspelled}: compare the arguments of `RelayConfig`.")
        if isinstance(self.text_config, PreTrainedConfig):
            self.text_config = copy.deepcopy(self.text_config)  # the caller's is not changed
        super().__post_init__(**kwargs)
        # The pattern of block diffusion is neither causal nor not; transformers would write to it in every forward.
        vars(self.text_config).pop("is_causal", None)
        # First, because the following lines read fields that every supported backbone has.
        self.validate_backbone()
        self.validate_numbers()
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if not self.channel_class.may_start_from_zeros:
            self.relay_initial_state = "none"
        if self.relay_readout == "pre_norm":
            # Otherwise transformers reports the final norm's output in place of the last layer's.
            self.text_config.tie_last_hidden_states = False
        # The strict dataclass runs `validate_*` too, but wraps their errors: run here, users see a plain ValueError.
        self.validate_mask_token()
        self.validate_block()
        self.validate_relay_layer()
        self.validate_channel()

    def validate_numbers(self) -> None:
        for name, value in {**self.text_config.to_dict(), "relay_norm_eps": self.relay_norm_eps}.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`{name}={value}` is not a finite number: correct the configuration.")
            if name in COUNTS and isinstance(value, int) and value < 1:
                raise ValueError(f"`{name}={value}` must be at least 1: correct the configuration of the backbone.")
            if name.endswith("norm_eps") and isinstance(value, float | int) and not 0 < value < 1:
                raise ValueError(f"`{name}={value}` must lie between 0 and 1: 1e-6 is usual.")

    def validate_mask_token(self) -> None:
        vocab_size = self.text_config.vocab_size
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < vocab_size:
            raise ValueError(
                f"`mask_token_id={self.mask_token_id}` is outside the vocabulary of {vocab_size} tokens: let "
                "`relay_hf.convert(source, output)` add a row for a new [MASK], or give the id of a token that no text "
                "uses."
            )

    def validate_block(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"`block_size={self.block_size}` must be at least 1; `None` makes one block of the whole.")
        if self.block_size is not None and isinstance(self.positions, int) and self.block_size > self.positions:
            raise ValueError(
                f"`block_size={self.block_size}` exceeds the {self.positions} positions of the backbone: choose a "
                "smaller one, or `None` to denoise the whole sequence at once."
            )

    def validate_relay_layer(self) -> None:
        layers = self.text_config.num_hidden_layers
        if not -layers <= self.relay_layer < layers:
            raise ValueError(
                f"`relay_layer={self.relay_layer}` does not exist in a backbone of {layers} layers: choose one in "
                f"[{-layers}, {layers - 1}]."
            )
        if self.relay_readout == "post_norm" and self.relay_layer not in (-1, layers - 1):
            raise ValueError(
                f"`relay_readout='post_norm'` reads behind the last layer, but `relay_layer={self.relay_layer}`: set "
                "`relay_layer=-1` or `relay_readout='pre_norm'`."
            )

    def validate_backbone(self) -> None:
        check_backbone(self.text_config)

    def validate_channel(self) -> None:
        channel = self.channel_class
        if unknown := sorted(set(self.relay_options or {}) - set(channel.options)):
            raise ValueError(
                f"`relay_options` names {unknown}, but `relay_channel={self.relay_channel!r}` has the options "
                f"{sorted(channel.options)}: leave out what it does not know."
            )
        channel.check(self)

    @property
    def channel_class(self) -> type[Channel]:
        """The class that is registered under the name `relay_channel`.

        Raises:
            ValueError: no class is.
        """
        return CHANNELS.find(self.relay_channel)

    @property
    def relay_state_width(self) -> int:
        """W, numbers of relay state per position; 0 if nothing is carried."""
        return self.channel_class.state_width(self)

    @property
    def positions(self) -> int | None:
        """Positions that the backbone was made for; None if its configuration names no number."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def canvas_length(self) -> int | None:
        """`block_size` under the name by which vLLM knows that a model denoises."""
        return self.block_size

    @classmethod
    def fast_dllm_v2(cls, text_config: PreTrainedConfig | dict | None = None, **overrides: Any) -> "RelayConfig":
        """The published language-model instance: blocks of 32, token shift, zero-initialised channel on [MASK]s.

        Args:
            text_config: the backbone, by default Qwen2.
            overrides: any other argument of `RelayConfig`, for instance `mask_token_id` (default: 151665).
        """
        preset: dict[str, Any] = {"mask_token_id": 151665, "token_shift": True, "relay_norm_eps": 1e-6}
        return cls(text_config=text_config, **{**preset, **overrides})

    @classmethod
    def sudoku(cls, text_config: PreTrainedConfig | dict | None = None, **overrides: Any) -> "RelayConfig":
        """The published Sudoku instance: whole sequence, no shift, unit-initialised channel on every position.

        Args:
            text_config: the backbone, by default Qwen2.
            overrides: any other argument of `RelayConfig`, for instance the `mask_token_id` of your tokenizer.
        """
        preset = {"block_size": None, "relay_scope": "all", "relay_init": "ones", "relay_readout": "pre_norm"}
        return cls(text_config=text_config, **{**preset, **overrides})

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads `config.json`; the files of plain decoders and other diffusion models are translated."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict and config_dict.get("model_type") != cls.model_type:
            config_dict = foreign_config_to_relay(config_dict)
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the configuration; relay options among the keyword arguments replace those of the file.

        The Auto classes call it too. The options enter the dictionary first, so that they are validated together.
        """
        fields = {name: kwargs.pop(name) for name in RELAY_FIELDS & kwargs.keys()}
        return super().from_dict({**config_dict, **fields}, **kwargs)


RELAY_FIELDS = frozenset(RelayConfig.__annotations__) - {"text_config"}


def check_same_tokens(config: RelayConfig, reference: Any) -> None:
    """Raise a ValueError if a reference model predicts other tokens or blocks; its width and family may differ.

    Args:
        config: configuration of the model that receives the predictions.
        reference: the model that makes them.

    Raises:
        ValueError: the reference is no model of this library, or has another vocabulary, [MASK] or block size.
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
