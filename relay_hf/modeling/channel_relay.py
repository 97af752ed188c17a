"""Relay channels: what is carried from one denoising step to the next, and how it enters the embeddings.

A channel is a small module that describes itself; `register_channel` adds one from any package. Every state is one
tensor, (B, L, `config.relay_state_width`), position-aligned. So what keeps states (the cache, the rollout buffer) need
not know what they mean.

Legend: B rows, L positions, N masked ones among them, D hidden size, W width of the state, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers import initialization as init

from .head_relay import token_table
from .outputs_relay import Readings
from .registry_relay import Registry

# Logits held at a time while states are made of them.
LOGITS_AT_ONCE = 2**24


class ChannelPart(nn.Module):
    """A module that writes its own initial values; the model calls `reset_parameters` when it initialises."""

    def reset_parameters(self) -> None:
        """Writes the initial values with `transformers.initialization`, which spares what came from a checkpoint.

        transformers builds models on the meta device and initialises later: values that `__init__` writes are lost.
        """


class Channel(ChannelPart):
    """What a model carries between denoising steps. A subclass writes `inject` and `next_state`, and what differs.

    Its parameters stay in fp32 whatever the model's dtype is.

    Args:
        config: the model's `RelayConfig`.

    Attributes:
        reads_distribution: the state is made of what the head says (see `DistributionChannel`), and never
            differentiated; else of hidden states.
        may_start_from_zeros: zeros are a state of their own, with which a block may start.
        options: names and defaults of what `config.relay_options` may hold; `option_values` reads them.
        citation: BibTeX of the channel's source, for cards.
    """

    reads_distribution: ClassVar[bool] = False
    may_start_from_zeros: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Any]] = {}
    citation: ClassVar[str] = ""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.width = self.state_width(config)
        self.starts_from_zeros = config.relay_initial_state == "zeros"
        # When PEFT merges, it copies the `weight` of each module that it had replaced, without asking if there is one.
        self.register_parameter("weight", None)

    @classmethod
    def state_width(cls, config: PreTrainedConfig) -> int:
        """W, numbers of state per position; 0 if nothing is carried."""
        return config.text_config.hidden_size

    @classmethod
    def option_values(cls, config: PreTrainedConfig) -> dict[str, Any]:
        """The channel's options as the configuration has them."""
        return {**cls.options, **(config.relay_options or {})}

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        """Raise a ValueError of one sentence if a field of the configuration does not fit the channel."""

    @classmethod
    def sentence(cls, config: PreTrainedConfig) -> str:
        """What is carried, and how it enters: how a card says it."""
        return f"the state of `relay_channel={config.relay_channel!r}`."

    def initial_state(self, rows: int, length: int, device: torch.device) -> Tensor | None:
        """State of the first denoising step, (B, L, W) fp32, or None if nothing is to be injected."""
        if not (self.width and self.starts_from_zeros):
            return None
        return torch.zeros(rows, length, self.width, device=device)

    def forward(self, embeds: Tensor, receives: Tensor, state: Tensor) -> Tensor:
        """The embeddings of the next step: what `inject` makes of them where `receives`.

        Args:
            embeds: (B, L, D) token embeddings.
            receives: (B, L) bool, positions that get the state.
            state: (B, L, W) position-aligned state, any float dtype.

        Returns:
            (B, L, D) in the dtype of `embeds`.

        Raises:
            ValueError: `state` and `embeds` do not fit.
        """
        needed = (*embeds.shape[:-1], self.width)
        if state.shape != needed:
            raise ValueError(
                f"`relay_state` has shape {tuple(state.shape)}, but embeddings of shape {tuple(embeds.shape)} need "
                f"{needed}: pass the state that the previous forward returned for the same rows and positions."
            )
        return torch.where(receives[..., None], self.inject(embeds, state).to(embeds.dtype), embeds)

    def inject(self, embeds: Tensor, state: Tensor) -> Tensor:
        """(B, L, D) embeddings and (B, L, W) state -> (B, L, D) embeddings with the state, any float dtype."""
        raise NotImplementedError

    def next_state(self, readings: Readings) -> Tensor | None:
        """The state that a forward pass leaves behind, (B, L, W).

        It is not called `update`, because PEFT wraps the channel in a module that has an `update` of its own.
        """
        raise NotImplementedError


class NoChannel(Channel):
    """Forgets everything between steps: a plain masked diffusion model."""

    @classmethod
    def state_width(cls, config: PreTrainedConfig) -> int:
        return 0

    @classmethod
    def sentence(cls, config: PreTrainedConfig) -> str:
        return ""

    def forward(self, embeds: Tensor, receives: Tensor, state: Tensor) -> Tensor:
        raise ValueError(
            "A `relay_state` was given to a model with `relay_channel='none'`: leave it out, or use one with a channel."
        )

    def next_state(self, readings: Readings) -> None:
        return None


class RelayLayerNorm(ChannelPart, nn.LayerNorm):
    """A LayerNorm in fp32 whose weight starts at `initial_weight` (0 makes a fresh channel an exact no-op).

    It writes its initial values itself: in code from the Hub, transformers initialises only what owns parameters.
    """

    def __init__(self, size: int, eps: float, initial_weight: float) -> None:
        self.initial_weight = initial_weight
        super().__init__(size, eps=eps, dtype=torch.float32)

    def reset_parameters(self) -> None:
        init.constant_(self.weight, self.initial_weight)
        init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalises in fp32, whatever the dtypes of input and parameters have become."""
        return F.layer_norm(input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class LayerNormChannel(Channel):
    """Relay: adds a LayerNorm of the carried hidden state, `e_i + LN(h_i)` (arXiv 2605.22967, Algorithm 1).

    The parameters are fp32 whatever the model's dtype is, and so is the arithmetic: with the published learning rate a
    zero-initialised weight stays below about 1e-3, where bf16 would lose most updates.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        initial_weight = {"zeros": 0.0, "ones": 1.0}[config.relay_init]
        self.norm = RelayLayerNorm(self.width, config.relay_norm_eps, initial_weight)

    @classmethod
    def sentence(cls, config: PreTrainedConfig) -> str:
        read_out = "final norm" if config.relay_readout == "post_norm" else f"layer {config.relay_layer}"
        where = "masked positions" if config.relay_scope == "masked" else "all positions"
        return f"the output of the {read_out}, added at {where} through a LayerNorm."

    def inject(self, embeds: Tensor, state: Tensor) -> Tensor:
        return embeds + self.norm(state).to(embeds.dtype)

    def next_state(self, readings: Readings) -> Tensor:
        """The state is the hidden state itself, (B, L, D)."""
        return readings.read_out


class DistributionChannel(Channel):
    """Carries the mean embedding of what each masked position was predicted to be, and one number beside it.

    The state is (B, L, D + 1) fp32 (fp64 in a model of double precision): `D` numbers of the mean embedding, then the
    number. It is never differentiated, and never the logits themselves, which would be as wide as the vocabulary.
    """

    reads_distribution: ClassVar[bool] = True

    @classmethod
    def state_width(cls, config: PreTrainedConfig) -> int:
        return config.text_config.hidden_size + 1

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        if config.relay_scope == "all":
            raise ValueError(
                f"`relay_scope='all'` has no meaning for `relay_channel={config.relay_channel!r}`, which replaces "
                "[MASK]s: set `relay_scope='masked'`."
            )

    def summarise(self, logits: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """(N, V) fp32 logits and (V, D) embeddings -> (N, D) mean embeddings and (N,) numbers."""
        raise NotImplementedError

    def share(self, number: Tensor) -> Tensor:
        """(B, L, 1) numbers -> weight of the mean embedding against the embedding itself: by default, the numbers."""
        return number

    def inject(self, embeds: Tensor, state: Tensor) -> Tensor:
        """Interpolates between each embedding and the carried mean."""
        state = at_least_single(state)
        share = self.share(state[..., -1:])
        return (1.0 - share) * at_least_single(embeds) + share * state[..., :-1]

    @torch.no_grad()
    def next_state(self, readings: Readings) -> Tensor:
        """The masked positions' distributions, summarised; zeros elsewhere. (B, L, D + 1) fp32."""
        hidden = readings.head_inputs[readings.places()]  # (N, D)
        return self.state_of(hidden, readings.is_masked, readings.head, readings.embeddings)

    @torch.no_grad()
    def state_of(
        self, head_inputs: Tensor, is_masked: Tensor, head: Callable[[Tensor], Tensor], embeddings: nn.Module
    ) -> Tensor:
        """The state that any model's predictions make, so that another model can supply it.

        Args:
            head_inputs: (N, D') hidden states of that model at the masked positions, in row-major order; what comes
                behind them is not read.
            is_masked: (B, L) bool.
            head: (n, D') -> (n, V) logits of that model.
            embeddings: module that looks up the input tokens of the model that the state is for.

        Returns:
            (B, L, D + 1) fp32, zeros where nothing is masked.
        """
        table = token_table(embeddings)
        chunks = head_inputs.split(max(LOGITS_AT_ONCE // len(table), 1))
        means, numbers = zip(*[self.summarise(at_least_single(head(chunk)), table) for chunk in chunks], strict=True)
        summaries = torch.cat([at_least_single(torch.cat(means)), torch.cat(numbers)[:, None]], dim=-1)
        return summaries.new_zeros(*is_masked.shape, self.width).masked_scatter(is_masked[..., None], summaries)


class ResidualContextChannel(DistributionChannel):
    """Residual context diffusion (arXiv 2601.22954): the more uncertain, the more of the prediction is passed on.

        p_i = softmax(z_i),  mean_i = sum_v p_i(v) E_v,  a_i = H(softmax(z_i / T)) / log V,
        e_i <- (1 - a_i) e_i + a_i mean_i

    A state of zeros changes nothing. T is `config.relay_temperature`.
    """

    citation: ClassVar[str] = """@misc{hu2026residual,
  title         = {Residual Context Diffusion Language Models},
  author        = {Hu, Yuezhou and Singh, Harman and Maheswaran, Monishwaran and Xi, Haocheng and Hooper, Coleman
                   and Zhang, Jintao and Tomar, Aditya and Mahoney, Michael W. and Min, Sewon and Farajtabar, Mehrdad
                   and Keutzer, Kurt and Gholami, Amir and Xu, Chenfeng},
  year          = {2026},
  eprint        = {2601.22954},
  archivePrefix = {arXiv}
}"""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.temperature = config.relay_temperature

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        super().check(config)
        if not 0 < config.relay_temperature < math.inf:
            raise ValueError(
                f"`relay_temperature={config.relay_temperature}` must be above 0, and finite; 1 leaves the "
                "distribution unchanged."
            )

    @classmethod
    def sentence(cls, config: PreTrainedConfig) -> str:
        return "the mean embedding of what was predicted, mixed into the masks: the more, the less sure."

    def summarise(self, logits: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        entropy = torch.special.entr((logits / self.temperature).softmax(-1)).sum(-1)
        return logits.softmax(-1).to(embeddings.dtype) @ embeddings, entropy / math.log(logits.shape[-1])


class SoftMaskChannel(DistributionChannel):
    """Soft-masking (arXiv 2510.17206): the surer, the more of the prediction is passed on.

        mean_i = sum over the k best v of p_i(v) E_v, normalised over those k,
        e_i <- (1 - s_i) e_i + s_i mean_i,  s_i = w_s sigmoid(w_a (-H(p_i) - w_b))

    `relay_options={"mixing": "sphere"}` goes from e_i to mean_i along a sphere instead (after arXiv 2608.06529, as we
    understand it): directions turn, lengths are interpolated, and a mean is as long as its tokens are on average. The
    default is `"line"`.

    The three weights are learned, from 0, 10 / 1.5 and -0.75 on, as in the authors' code: a fresh channel changes
    nothing. k is `config.relay_top_k`. The first step has no state, and its [MASK]s are plain ones: a
    state of zeros would be a sure prediction.
    """

    may_start_from_zeros: ClassVar[bool] = False
    options: ClassVar[Mapping[str, Any]] = {"mixing": "line"}
    citation: ClassVar[str] = """@misc{hersche2025softmasked,
  title         = {Soft-Masked Diffusion Language Models},
  author        = {Hersche and Moor-Smith and Hofmann and Rahimi},
  year          = {2025},
  eprint        = {2510.17206},
  archivePrefix = {arXiv}
}"""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.top_k = config.relay_top_k
        self.on_sphere = self.option_values(config)["mixing"] == "sphere"
        self.weight = nn.Parameter(torch.empty(3, dtype=torch.float32))

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        super().check(config)
        if not 1 <= config.relay_top_k <= config.text_config.vocab_size:
            raise ValueError(
                f"`relay_top_k={config.relay_top_k}` must be at least 1, and at most the "
                f"{config.text_config.vocab_size} tokens of the vocabulary: how many predictions to mix."
            )
        if cls.option_values(config)["mixing"] not in ("line", "sphere"):
            raise ValueError(
                f"`relay_options={config.relay_options}` has a `mixing` that is unknown: give 'line' or 'sphere'."
            )

    @classmethod
    def sentence(cls, config: PreTrainedConfig) -> str:
        best = f"the {config.relay_top_k} likeliest tokens"
        how = "mixed into the masks" + " along a sphere" * (cls.option_values(config)["mixing"] == "sphere")
        return f"the mean embedding of {best}, {how}: the more, the surer."

    def reset_parameters(self) -> None:
        init.copy_(self.weight, torch.tensor([0.0, 10.0 / 1.5, -0.75]))

    def summarise(self, logits: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = logits.softmax(-1)
        best, tokens = probabilities.topk(self.top_k, dim=-1)  # (N, k)
        best = (best / best.sum(-1, keepdim=True)).to(embeddings.dtype)
        mixed = embeddings[tokens]  # (N, k, D)
        mean, entropy = torch.einsum("nk,nkd->nd", best, mixed), torch.special.entr(probabilities).sum(-1)
        if self.on_sphere:
            mean = mean * (best * length(mixed).squeeze(-1)).sum(-1, keepdim=True) / length(mean)
        return mean, entropy

    def share(self, number: Tensor) -> Tensor:
        scale, slope, shift = self.weight.unbind()
        return scale * torch.sigmoid(slope * (-number - shift))

    def inject(self, embeds: Tensor, state: Tensor) -> Tensor:
        """Mixes along the line between embedding and mean, or along the sphere."""
        if not self.on_sphere:
            return super().inject(embeds, state)
        state = at_least_single(state)
        return along_sphere(at_least_single(embeds), state[..., :-1], self.share(state[..., -1:]))


def length(vectors: Tensor) -> Tensor:
    """(..., D) -> (..., 1) Euclidean lengths, above 0."""
    return vectors.norm(dim=-1, keepdim=True).clamp_min(1e-6)


def along_sphere(first: Tensor, last: Tensor, share: Tensor) -> Tensor:
    """From `first` (share 0, exactly) to `last` (share 1): the direction along a great circle, the length linearly.

    Args:
        first, last: (..., D) vectors.
        share: (..., 1).
    """
    growth = length(last) / length(first)
    cosine = (first * last).sum(-1, keepdim=True) / (length(first) * length(last))
    angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).arccos()  # whose derivative is infinite at 1, where sphere and line agree
    turned = ((1 - share) * angle).sin() / angle.sin() * first + (share * angle).sin() / angle.sin() / growth * last
    return turned * (1 - share + share * growth)


CHANNELS: Registry[type[Channel]] = Registry("relay_channel", Channel, "relay_hf.register_channel")


def register_channel(name: str, cls: type[Channel]) -> None:
    """Makes a channel known, so that `relay_channel=name` means it: in configurations, checkpoints and cards.

    Call it where the class is defined: a process that loads a checkpoint with the channel has to import that module.

    Args:
        name: as `relay_channel` is to have it.
        cls: subclass of `Channel`.

    Raises:
        ValueError: the name is taken, or `cls` is no channel.
    """
    if getattr(cls, "reads_distribution", False) and not hasattr(cls, "state_of"):
        raise ValueError(
            f"`register_channel({name!r}, ...)` was given {cls!r}, which reads distributions, but has no `state_of`: "
            "inherit from `DistributionChannel`."
        )
    CHANNELS.add(name, cls)


register_channel("none", NoChannel)
register_channel("layer_norm", LayerNormChannel)
register_channel("residual_context", ResidualContextChannel)
register_channel("soft_mask", SoftMaskChannel)


def in_scope(config: PreTrainedConfig, is_masked: Tensor) -> Tensor:
    """(B, L) bool, positions that the state enters under `config.relay_scope`, given those that are masked."""
    return torch.ones_like(is_masked) if config.relay_scope == "all" else is_masked


def at_least_single(tensor: Tensor) -> Tensor:
    """In fp32; a model in double precision keeps that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
