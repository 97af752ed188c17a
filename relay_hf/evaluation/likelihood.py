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

Legend: M different masks, S positions of a block, L scored ones among them, N masked ones over all rows, V vocabulary.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..modeling import RelayCache
from ..modeling.prefix_relay import denoise

# Numbers that may be held as logits at a time: with 151 936 tokens, 1767 positions.
LOGITS_AT_ONCE = 2**28

Request = tuple[Sequence[int], Sequence[int]]


class LikelihoodBound:
    """Estimates the bound for one request after the other; what comes out depends on nothing but request and seed.

    Args:
        model: a `RelayForMaskedDiffusion` in eval mode, possibly wrapped by PEFT.
        samples: masks drawn per block. Equal ones are run once, so L positions never cost more than 2^L - 1 rows, and
            a single one gives its exact log-probability.
        seed: of the masks, together with the request's tokens.
        use_relay: run noisy blocks twice if the model has a channel; False = once, as if it had none.

    Raises:
        ValueError: `samples` is not positive.
    """

    def __init__(self, model: Any, samples: int = 32, seed: int = 0, use_relay: bool = True) -> None:
        if samples < 1:
            raise ValueError(f"`samples={samples}` draws no mask: choose at least 1, for instance 32.")
        self.model = model
        self.samples = samples
        self.seed = seed
        self.carries_state = use_relay and model.config.relay_channel != "none"
        self.block_size: int | None = model.config.block_size
        self.mask_token_id: int = model.config.mask_token_id

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[int, float]]:
        """Yields (index of the request, estimate in nats), requests that share a prefix one after the other.

        Args:
            requests: pairs of context and continuation, both tokens; either may be empty.

        Raises:
            ValueError: a context holds [MASK].
        """
        by_prefix: dict[tuple[int, ...], list[int]] = {}
        for index, (context, _) in enumerate(requests):
            if self.mask_token_id in context:
                raise ValueError(
                    "The context holds [MASK] tokens, which are not text to continue: remove them from the request."
                )
            whole_blocks = len(context) // self.block_size * self.block_size if self.block_size else 0
            by_prefix.setdefault(tuple(context[:whole_blocks]), []).append(index)
        for prefix, indices in by_prefix.items():
            cache = RelayCache(config=self.model.config.text_config)
            self._commit(cache, torch.tensor(prefix, dtype=torch.long, device=self.model.device))
            for index in indices:
                yield index, self._bound(cache, len(prefix), *requests[index])

    def _bound(self, cache: RelayCache, committed: int, context: Sequence[int], continuation: Sequence[int]) -> float:
        """Sums the blocks; `cache` holds the first `committed` tokens of the context, and is left as it is."""
        if self.mask_token_id in continuation:
            return -torch.inf
        generator = torch.Generator().manual_seed(self._seed_of(context, continuation))
        text = torch.tensor([*context, *continuation], device=self.model.device)
        width = self.block_size or len(text)
        total = 0.0
        for begin in range(committed, len(text) if continuation else committed, width):
            if begin > committed:
                cache = copy.deepcopy(cache) if begin == committed + width else cache
                self._commit(cache, text[begin - width : begin])
            clean = text[begin : begin + width]
            # What fills up the last block stops where the model's positions end.
            stop = min(begin + width, max(len(text), self.model.config.positions or begin + width))
            block = F.pad(clean, (0, stop - begin - len(clean)), value=self.mask_token_id)
            scored = slice(max(len(context) - begin, 0), len(clean))
            total += self._bound_of_block(cache, block, scored, generator)
        return total

    def _bound_of_block(self, cache: RelayCache, block: Tensor, scored: slice, generator: torch.Generator) -> float:
        """The bound of the `scored` positions of `block`, (S,), given the committed blocks."""
        masks, weights = draw_masks(scored.stop - scored.start, self.samples, generator)
        masked = torch.zeros(len(masks), len(block), dtype=torch.bool)
        masked[:, scored] = masks
        # Cut by size alone, so that the numbers do not depend on what else is evaluated.
        rows_at_once = max(1, LOGITS_AT_ONCE // (self.model.config.text_config.vocab_size * masks.shape[1]))
        sums = [self._log_probabilities(cache, block, rows.to(block.device)) for rows in masked.split(rows_at_once)]
        return float((weights * torch.cat(sums)).sum())

    def _log_probabilities(self, cache: RelayCache, block: Tensor, masked: Tensor) -> Tensor:
        """(M,) fp64 log-probability of the tokens of `block`, (S,), that are `masked`, (M, S), summed in each row."""
        noisy = torch.where(masked, self.mask_token_id, block)
        row, place = masked.nonzero().unbind(-1)  # (N,)
        state = None
        if self.carries_state:
            initial = self.model.initial_relay_state(*noisy.shape)
            state = denoise(self.model, noisy, cache.shared_prefix(), initial, None).relay_state
        output = denoise(self.model, noisy, cache.shared_prefix(), state, (row, place), leaves_state=False)
        logits = self.model.lm_head(output.head_inputs).float()
        logits[:, self.mask_token_id] = -torch.inf
        # Summed on the CPU, because not every device has fp64.
        chosen = logits.log_softmax(-1).gather(-1, block[place][:, None])[:, 0].cpu().double()
        return chosen.new_zeros(len(masked)).index_add(0, row.cpu(), chosen)

    def _commit(self, cache: RelayCache, tokens: Tensor) -> None:
        """Writes clean tokens, (n,), to the cache, without any relay state."""
        if len(tokens):
            self.model(tokens[None], cache=cache, logits_to_keep=tokens.new_empty(0))

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
