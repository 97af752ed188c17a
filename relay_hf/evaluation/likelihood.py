"""Log-likelihood of text under a masked diffusion model: a Monte-Carlo estimate of a lower bound.

A masked diffusion model gives p(token | what is visible), not p(text). Revealing a block's L positions one by one in a
random order is a generative process, whose log-likelihood is bounded from below (the "ELBO") by

    log p(c | x) >= sum over blocks  E_l E_S [ L / l * sum over i in S of log p(c_i | S masked, clean blocks before) ]

with l uniform in 1..L and S uniform among the subsets of l of the block's L scored positions: the estimator of LLaDA
(arXiv 2502.09992), block by block.

- Only positions of the continuation are masked and scored; the context stays visible, also in the same block.
- Positions of the last block behind the end of the text are visible [MASK]s, as in decoding; they are not scored.
- [MASK] has probability 0: decoding never writes it, so the other tokens share all probability. A text that holds
  [MASK] has log-likelihood -inf.
- With a relay, a noisy block runs twice, from the model's initial state and then with the state the first pass left.
  The second pass counts. (The published evaluation does the same.)

Requests of one shape run together: those that begin behind as many whole blocks, and end with the same block. Each
brings its own masks, as rows of one forward, and every row sees the clean text of its own request.

Legend: R requests of a batch, M rows, that is, different masks of them all, S positions of a block, L scored ones among
them, N masked ones over all rows, P clean positions before the block, V vocabulary.
"""

import copy
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modeling import RelayCache
from ..modeling.prefix_relay import denoise

# Numbers that may be held as logits at a time: with 151 936 tokens, 1767 positions.
LOGITS_AT_ONCE = 2**28
# Positions that the rows of a forward may see, and that the clean texts of a batch may have, all together.
POSITIONS_AT_ONCE = 2**16

Request = tuple[Sequence[int], Sequence[int]]


class Shape(NamedTuple):
    """What requests that run together have in common.

    Args:
        end: positions of the text, what fills up the last block included.
        begin: clean positions before the first block that is scored.
    """

    end: int
    begin: int


class Text(NamedTuple):
    """A request on its way through the blocks, on the CPU.

    Args:
        tokens: (end,) context, continuation and the [MASK]s that fill up the last block.
        scored: positions of the continuation.
        generator: of its masks.
    """

    tokens: Tensor
    scored: range
    generator: torch.Generator


class LikelihoodBound:
    """Estimates the bound of requests; the masks depend on nothing but request and seed.

    Args:
        model: a `RelayForMaskedDiffusion` in eval mode, possibly wrapped by PEFT.
        samples: masks drawn per block. Equal ones are run once, so L positions never cost more than 2^L - 1 rows, and
            a single one gives its exact log-probability.
        seed: of the masks, together with the request's tokens.
        use_relay: run noisy blocks twice if the model has a channel; False = once, as if it had none.
        batch_size: requests that run together at most; None = as many as `POSITIONS_AT_ONCE` allows. Batches change no
            number by more than rounding.

    Raises:
        ValueError: `samples` or `batch_size` is not positive.
    """

    def __init__(
        self, model: Any, samples: int = 32, seed: int = 0, use_relay: bool = True, batch_size: int | None = None
    ) -> None:
        if samples < 1:
            raise ValueError(f"`samples={samples}` draws no mask: choose at least 1, for instance 32.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size={batch_size}` runs no request: choose at least 1, or None for no limit.")
        self.model = model
        self.samples = samples
        self.seed = seed
        self.batch_size = batch_size
        self.carries_state = use_relay and model.config.relay_channel != "none"
        self.block_size: int | None = model.config.block_size
        self.mask_token_id: int = model.config.mask_token_id

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[int, float]]:
        """Yields (index of the request, estimate in nats), the longest requests first.

        Args:
            requests: pairs of context and continuation, both tokens; either may be empty.

        Raises:
            ValueError: a context holds [MASK].
        """
        by_shape: dict[Shape, list[int]] = defaultdict(list)
        known: dict[int, float] = {}
        for index, (context, continuation) in enumerate(requests):
            if self.mask_token_id in context:
                raise ValueError(
                    "The context holds [MASK] tokens, which are not text to continue: remove them from the request."
                )
            if self.mask_token_id in continuation:
                known[index] = -torch.inf
            elif not continuation:
                known[index] = 0.0
            else:
                by_shape[self._shape(len(context), len(continuation))].append(index)
        for shape in sorted(by_shape, reverse=True):
            yield from self._bounds_of_shape(shape, {index: requests[index] for index in by_shape[shape]})
        yield from known.items()

    def requests_at_once(self, length: int) -> int:
        """How many requests of so many positions run together at most."""
        by_size = max(POSITIONS_AT_ONCE // length, 1)
        return by_size if self.batch_size is None else min(by_size, self.batch_size)

    def _shape(self, context: int, continuation: int) -> Shape:
        """The shape of a request with so many tokens of each."""
        length = context + continuation
        if self.block_size is None:
            return Shape(end=length, begin=0)
        last = (length - 1) // self.block_size * self.block_size
        # What fills up the last block stops where the model's positions end.
        limit = max(length, self.model.config.positions or last + self.block_size)
        return Shape(end=min(last + self.block_size, limit), begin=context // self.block_size * self.block_size)

    def _bounds_of_shape(self, shape: Shape, requests: dict[int, Request]) -> Iterator[tuple[int, float]]:
        """(Index, bound) of requests of one shape; batches that see the same clean texts share their forward."""

        def clean(index: int) -> tuple[int, ...]:
            return tuple(requests[index][0][: shape.begin])

        indices = sorted(requests, key=clean)
        size = self.requests_at_once(shape.end)
        batches = [indices[first : first + size] for first in range(0, len(indices), size)]
        for prefixes, some in groupby(batches, key=lambda batch: list(dict.fromkeys(map(clean, batch)))):
            cache = RelayCache(config=self.model.config.text_config)
            self._commit(cache, torch.tensor(prefixes, dtype=torch.long))
            for batch in some:
                texts = [self._text(shape, *requests[index]) for index in batch]
                rows = torch.tensor([prefixes.index(clean(index)) for index in batch])
                yield from zip(batch, self._bounds(cache, rows, texts, shape), strict=True)

    def _text(self, shape: Shape, context: Sequence[int], continuation: Sequence[int]) -> Text:
        tokens = torch.full((shape.end,), self.mask_token_id)
        scored = range(len(context), len(context) + len(continuation))
        tokens[: scored.stop] = torch.tensor([*context, *continuation])
        return Text(tokens, scored, torch.Generator().manual_seed(self._seed_of(context, continuation)))

    def _bounds(self, cache: RelayCache, rows: Tensor, texts: list[Text], shape: Shape) -> list[float]:
        """Bounds of a batch.

        Args:
            cache: holds the first `shape.begin` tokens of each text, and is left as it is.
            rows: (R,) row of the cache that each text begins with.
            texts: R of them.
            shape: of them all.
        """
        tokens = torch.stack([text.tokens for text in texts])  # (R, end)
        width = self.block_size or shape.end
        owners, weights, scores = [], [], []
        for begin in range(shape.begin, shape.end, width):
            if begin > shape.begin:
                if begin == shape.begin + width:  # from now on, each text has a row of its own
                    cache = copy.deepcopy(cache)
                    cache.batch_select_indices(rows.to(self.model.device))
                    rows = torch.arange(len(texts))
                self._commit(cache, tokens[:, begin - width : begin])
            block = slice(begin, min(begin + width, shape.end))
            owner, weight, masked = self._draw(texts, block)
            row = masked.nonzero()[:, 0]  # (N,)
            owners.append(owner[row])
            weights.append(weight[row])
            scores.append(self._log_probabilities(cache, rows[owner], tokens[owner, block], masked))
        # One wait for the device. Summed on the CPU, because not every device has fp64.
        terms = torch.cat(weights) * torch.cat(scores).cpu().double()
        return terms.new_zeros(len(texts)).index_add(0, torch.cat(owners), terms).tolist()

    def _draw(self, texts: list[Text], block: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Masks of a block: (M,) the text of each, (M,) fp64 how much it counts, and (M, S) bool which are masked."""
        owners, weights, masks = [], [], []
        for owner, text in enumerate(texts):
            scored = range(max(text.scored.start, block.start), min(text.scored.stop, block.stop))
            drawn, weight = draw_masks(len(scored), self.samples, text.generator)
            masked = torch.zeros(len(drawn), block.stop - block.start, dtype=torch.bool)
            masked[:, scored.start - block.start : scored.stop - block.start] = drawn
            owners.append(torch.full((len(drawn),), owner))
            weights.append(weight)
            masks.append(masked)
        return torch.cat(owners), torch.cat(weights), torch.cat(masks)

    def _log_probabilities(self, cache: RelayCache, rows: Tensor, clean: Tensor, masked: Tensor) -> Tensor:
        """(N,) fp32 log-probability of each masked token, on the device, row by row.

        Args:
            cache: holds the clean texts before the block.
            rows: (M,) row of the cache that each mask belongs to.
            clean: (M, S) tokens of the blocks.
            masked: (M, S) bool.
        """
        # Cut by size alone, so that memory does not depend on the requests.
        at_once = max(1, POSITIONS_AT_ONCE // (cache.get_seq_length() + masked.shape[1]))
        pieces = zip(*(part.split(at_once) for part in (rows, clean, masked)), strict=True)
        return torch.cat([self._log_probabilities_at_once(cache, *piece) for piece in pieces])

    def _log_probabilities_at_once(self, cache: RelayCache, rows: Tensor, clean: Tensor, masked: Tensor) -> Tensor:
        device = self.model.device
        noisy = torch.where(masked, self.mask_token_id, clean).to(device)
        row, place = masked.nonzero().unbind(-1)
        seen = (rows[:1] if bool((rows == rows[0]).all()) else rows).to(device)  # one row serves many
        state = None
        if self.carries_state:
            initial = self.model.initial_relay_state(*noisy.shape)
            state = denoise(self.model, noisy, cache.shared_prefix(seen), initial, None).relay_state
        scored = (row.to(device), place.to(device))
        output = denoise(self.model, noisy, cache.shared_prefix(seen), state, scored, leaves_state=False)
        size = max(1, LOGITS_AT_ONCE // self.model.config.text_config.vocab_size)
        parts = zip(output.head_inputs.split(size), clean[masked].to(device).split(size), strict=True)
        return torch.cat([self._score(*part) for part in parts])

    def _score(self, head_inputs: Tensor, tokens: Tensor) -> Tensor:
        """(n, D) inputs of the head and (n,) tokens -> (n,) fp32 log-probabilities, [MASK] having none."""
        logits = self.model.deciding_logits(head_inputs).float()
        logits[:, self.mask_token_id] = -torch.inf
        return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

    def _commit(self, cache: RelayCache, tokens: Tensor) -> None:
        """Writes clean tokens, (R, n), to the cache, without any relay state."""
        if tokens.shape[1]:
            tokens = tokens.to(self.model.device)
            self.model(tokens, cache=cache, logits_to_keep=tokens.new_empty(0))

    def _seed_of(self, context: Sequence[int], continuation: Sequence[int]) -> int:
        """63 bits of seed and request; `hash` would differ from process to process."""
        digest = hashlib.sha256(repr((self.seed, list(context), list(continuation))).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


def draw_masks(length: int, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws subsets of `length` positions, and says how much each counts in the bound.

    They are spread evenly, which lowers the variance and leaves the expectation: each size in 1..length comes up
    equally often, up to one, and subsets of one size are windows that go around a circle of randomly ordered positions,
    in a new order once they have begun everywhere. Each sample alone is a uniform subset of a uniform size.

    Returns:
        (M, L) bool, the different subsets; (M,) fp64, the share of the samples that drew each, times L / l.
    """
    sample = torch.arange(samples)
    position = (sample + torch.rand(1, generator=generator, dtype=torch.float64)) / samples
    size = (position * length).long().clamp(max=length - 1) + 1  # ascending
    number = (sample - torch.searchsorted(size, size)) % length  # of the window on its circle
    order = torch.rand(samples, length, generator=generator, dtype=torch.float64).argsort(-1)[sample - number]
    # Side by side, until a border is met again: then one further, so that no window comes twice.
    begin = number * size + number * torch.gcd(size, torch.tensor(length)) // length
    masked = (order - begin[:, None]) % length < size[:, None]
    masks, counts = masked.unique(dim=0, return_counts=True)
    return masks, counts.double() / samples * length / masks.sum(-1)
