"""The model `relay` of lm-evaluation-harness: `HFLM` with the likelihood and the decoding of masked diffusion.

Loading, tokenization, chat templates and batching are those of `HFLM`. Beside the abstract `_loglikelihood_tokens` two
of its private methods are overridden, `_get_config` and `_model_generate`: there are no public ones to load our
configuration and to decode through. `tests/evaluation/harness/test_model.py` fails if they move.

Legend: B rows of a batch, P columns of their prompts.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, StoppingCriteriaList

from ...modeling import RelayConfig, RelayForMaskedDiffusion
from ...modeling.generation_options_relay import GREEDY, option_names
from ..forwards import COSTS, count_costs
from ..likelihood import LikelihoodBound, Request
from ..stop_texts import StopTexts
from ..weights import hash_weights

# Whether and how tokens are drawn is set by tasks.
GENERATION_OPTIONS = option_names("unmasking")
# They decide how fast texts come, not which.
SPEED_OPTIONS = ("cache_implementation", "compile_config")


@dataclass(frozen=True)
class GenerationForwards:
    """What one `generate_until` request cost.

    Args:
        task_name, doc_id: the request, as in the harness' logged samples.
        denoise_forwards, commit_forwards, prefill_forwards: as `RelayGenerateOutput` counts them for the row.
        new_tokens: tokens that were written, the stop text included.
    """

    task_name: str
    doc_id: int
    denoise_forwards: int
    commit_forwards: int
    prefill_forwards: int
    new_tokens: int


@register_model("relay")
class RelayLM(HFLM):
    """A masked diffusion model in lm-evaluation-harness; `docs/evaluation.md` has the command and the estimator.

    Args:
        pretrained: path or id of a checkpoint, or a `RelayForMaskedDiffusion`.
        mc_samples: masks drawn per block for a log-likelihood.
        mc_seed: seed of those masks.
        kwargs: those of `GENERATION_OPTIONS` and `SPEED_OPTIONS` replace the model's own settings wherever it decodes,
            unless a task sets them itself. The rest is that of `HFLM`, which hands what it does not know
            (`mask_token_id`, `block_size`, ...) to `from_pretrained`.

    `generation_forwards` lists what each `generate_until` request cost, in the order of the requests; means per task
    are part of the results (`results["config"]["generation_forwards"]`). Of several processes, each knows its own.
    """

    AUTO_MODEL_CLASS = RelayForMaskedDiffusion

    def __init__(
        self, pretrained: str | PreTrainedModel, *, mc_samples: int = 32, mc_seed: int = 0, **kwargs: Any
    ) -> None:
        options = (*GENERATION_OPTIONS, *SPEED_OPTIONS)
        self.generation_options = {name: kwargs.pop(name) for name in options if name in kwargs}
        super().__init__(pretrained, backend="causal", **kwargs)
        use_relay = self.generation_options.get("use_relay", self.model.generation_config.use_relay)
        # "auto" is measured on requests of full length, which most are not: here it means as many as memory allows.
        size = self.batch_size if isinstance(self.batch_size, int) else None
        self.likelihood = LikelihoodBound(self.model, mc_samples, mc_seed, use_relay, size)
        self.generation_forwards: list[GenerationForwards] = []
        # Contexts of the batch in work, and the costs of every decoded row, by its context.
        self._contexts: list[str] = []
        self._decoded: dict[str, list[dict[str, int]]] = defaultdict(list)

    def _get_config(self, pretrained: str, *, revision: str = "main", subfolder: str = "", **kwargs: Any) -> None:
        # Not AutoConfig: it does not know the research fork's checkpoints.
        self._config = RelayConfig.from_pretrained(pretrained, revision=revision, subfolder=subfolder)

    def get_model_info(self) -> dict[str, Any]:
        """The model's entry in the results; the harness asks for it when all requests have run."""
        by_task = defaultdict(list)
        for record in self.generation_forwards:
            by_task[record.task_name].append(record)
        means = {
            task: {"requests": len(records), **{name: fmean(getattr(r, name) for r in records) for name in COSTS}}
            for task, records in by_task.items()
        }
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return {
            **super().get_model_info(),
            "weights": hash_weights(model),
            "generation_options": {
                name: self.generation_options.get(name, getattr(model.generation_config, name))
                for name in GENERATION_OPTIONS
            },
            "mc_samples": self.likelihood.samples,
            "mc_seed": self.likelihood.seed,
            "generation_forwards": means,
        }

    # -- log-likelihood ---------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Bound, and whether greedy decoding writes the continuation, of (texts, context, continuation) each.

        Raises:
            ValueError: a continuation leaves no room for a token of context, or a context holds [MASK].
        """
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        wanted = {(tuple(context), len(continuation)) for context, continuation in pairs}
        greedy = self._continue_greedily(wanted, disable_tqdm)
        answers: list[Any] = [None] * len(pairs)
        for index, bound in self._bounds(pairs, "Bounding log-likelihoods", disable_tqdm):
            context, continuation = pairs[index]
            written = greedy[tuple(context), len(continuation)]
            answers[index] = (bound, written == list(continuation))
            self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Sum of the bounds of the text's windows, each given one token before it (the last one more).

        The chain rule makes the sum a bound for the text, so perplexities computed from it are bounds from above.
        """
        pairs: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
            )
            pairs += map(utils.make_disjoint_window, windows)
            owners += [owner] * (len(pairs) - len(owners))
        bounds = dict(self._bounds(pairs, "Bounding windows", disable_tqdm))
        # In the order of the text: floating-point sums depend on it.
        totals = [0.0] * len(requests)
        for index, owner in enumerate(owners):
            totals[owner] += bounds[index]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _bounds(self, pairs: Sequence[Request], title: str, disable_tqdm: bool) -> Iterator[tuple[int, float]]:
        """The index of each pair, and its bound, as they come."""
        with self._autocast():
            yield from tqdm(self.likelihood(pairs), title, len(pairs), disable=disable_tqdm or self.rank != 0)

    def _fit(self, context: list[int], continuation: list[int]) -> Request:
        """Cuts the context on the left, so that both fit into the model's length."""
        room = self.max_length - len(continuation)
        if room < 1:
            raise ValueError(
                f"A continuation has {len(continuation)} tokens, but `max_length={self.max_length}` must hold at least "
                "one token of context as well: raise `max_length`, or leave out the task."
            )
        return context[-room:], continuation

    def _continue_greedily(
        self, wanted: set[tuple[tuple[int, ...], int]], disable_tqdm: bool
    ) -> dict[tuple[tuple[int, ...], int], list[int]]:
        """What greedy decoding writes for each wanted pair of a prompt and a number of tokens."""
        by_length = defaultdict(list)
        # The longest first: memory runs out at the beginning or never, and no estimate of the time left is too short.
        for prompt, length in sorted(wanted, key=lambda pair: (len(pair[0]) + pair[1], pair), reverse=True):
            by_length[length].append(prompt)
        written = {(prompt, 0): list[int]() for prompt in by_length.pop(0, [])}
        total, hidden = sum(map(len, by_length.values())), disable_tqdm or self.rank != 0
        with tqdm(desc="Decoding greedily", total=total, disable=hidden) as bar:
            for length, prompts in by_length.items():
                rows = self.likelihood.requests_at_once(len(prompts[0]) + length)
                for batch in (prompts[i : i + rows] for i in range(0, len(prompts), rows)):
                    written |= zip(((prompt, length) for prompt in batch), self._write(batch, length), strict=True)
                    bar.update(len(batch))
        return written

    def _write(self, prompts: Sequence[tuple[int, ...]], length: int) -> list[list[int]]:
        """The `length` tokens that greedy decoding writes behind each prompt."""
        tokens = [torch.tensor(prompt, device=self.device) for prompt in prompts]
        is_text = [torch.ones_like(row) for row in tokens]
        input_ids = pad_sequence(tokens, batch_first=True, padding_side="left")
        attention_mask = pad_sequence(is_text, batch_first=True, padding_side="left")
        output = self._generate(input_ids, attention_mask, max_new_tokens=length, do_sample=False)
        new = output.sequences[:, input_ids.shape[1] :]
        # All rows may have stopped early: as many tokens as if their neighbours had not.
        return F.pad(new, (0, length - new.shape[1]), value=self.tokenizer.pad_token_id).tolist()

    # -- decoding ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As in `HFLM`, the longest first, those of one setting in common batches; notes what each request costs."""
        by_setting = defaultdict(list)
        requests = [_without_empty_stops(request) for request in requests]
        for index, request in enumerate(requests):
            by_setting[repr(request.args[1])].append(index)
        texts: list[Any] = [None] * len(requests)
        records: list[Any] = [None] * len(requests)
        for indices in by_setting.values():
            self._decoded = defaultdict(list)
            written = super().generate_until([requests[i] for i in indices], disable_tqdm=disable_tqdm)
            for index, text in zip(indices, written, strict=True):
                request = requests[index]
                costs = self._decoded[request.args[0]].pop(0)  # equal requests run in their order
                texts[index] = text
                records[index] = GenerationForwards(request.task_name, request.doc_id, **costs)
        self.generation_forwards += records
        return texts

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # `_model_generate` does not get the requests of its rows.
        self._contexts = list(strings)
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """Decodes a batch and stops its rows at their own stop texts; (B, P) -> (B, P + new tokens)."""
        if not options.get("do_sample"):
            options.pop("temperature", None)
        output = self._generate(
            context,
            attention_mask,
            max_new_tokens=max_length - context.shape[1],
            stopping_criteria=StoppingCriteriaList([StopTexts(self.tokenizer, stop, context.shape[1])]),
            **options,
        )
        for row, text in enumerate(self._contexts):
            self._decoded[text].append(count_costs(output, row))
        return output.sequences

    def _generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        # Most tasks decode greedily, and then `generate` refuses a checkpoint's own settings of how to draw.
        drawing = {} if options.get("do_sample") else GREEDY
        with self._autocast():
            return self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                **{**drawing, **self.generation_options, **options},
            )

    # -- both -------------------------------------------------------------------------------------------------------

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


def _without_empty_stops(request: Instance) -> Instance:
    """The request with `until` a list of texts: `null` and "" stop at nothing."""
    context, options = request.args
    until = options.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    clean = copy.copy(request)
    clean.arguments = (context, {**options, "until": stops})
    return clean
