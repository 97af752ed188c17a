"""Asking a model: a chat up to the code of the answer, greedy block diffusion, and what each answer cost.

Legend: B problems of a batch, P columns of their prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from ...loading.checkpoint import check_decoding
from ...modeling import RelayConfig, RelayForMaskedDiffusion
from ...modeling.generation_options_relay import GREEDY
from ..forwards import count_costs
from ..stop_texts import StopTexts
from .chat_prompt import ChatPrompt
from .problems import Problem


@dataclass(frozen=True)
class Answer:
    """What a model wrote behind the opening of a code block, and what it took; counts as in `RelayGenerateOutput`."""

    text: str
    denoise_forwards: int
    commit_forwards: int
    prefill_forwards: int
    new_tokens: int


def decoding_options(given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `generate` that do not depend on the model, with those that were given."""
    return {**GREEDY, "return_dict_in_generate": True, **given}


def check_thresholds(
    config: RelayConfig, defaults: Any, options: dict[str, Any], thresholds: Sequence[float]
) -> Sequence[float]:
    """The thresholds, by default the model's own; raises ValueError if `generate` would refuse one, or an option."""
    thresholds = thresholds or [defaults.unmasking_threshold]
    for threshold in thresholds:
        check_decoding(config, defaults, {**options, "unmasking_threshold": threshold})
    return thresholds


class Answerer:
    """Answers problems greedily.

    Args:
        model, tokenizer: the tokenizer has a chat template.
        max_new_tokens: longest answer.
        stop_at_fence: end an answer with its first code block, not only at the stop token.
        options: further options of `generate`, that of the unmasking policy among them.
        chat_prompt: the words around a problem.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: RelayForMaskedDiffusion,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        stop_at_fence: bool,
        options: dict[str, Any],
        chat_prompt: ChatPrompt,
    ) -> None:
        if tokenizer.chat_template is None:
            raise ValueError("The tokenizer has no chat template: set `tokenizer.chat_template` and save it.")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        stop_token = model.generation_config.eos_token_id
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.stop_at_fence = stop_at_fence
        self.chat_prompt = chat_prompt
        self.max_new_tokens = max_new_tokens
        self.options = {
            "eos_token_id": tokenizer.eos_token_id if stop_token is None else stop_token,
            **decoding_options(options),
        }

    def prompt(self, problem: Problem) -> str:
        """The chat up to the opening of the code block that the model is to write."""
        return self.chat_prompt.text(problem.question, self.tokenizer)

    def check_lengths(self, problems: Sequence[Problem]) -> None:
        """Raise if a problem does not fit.

        Raises:
            ValueError: the longest prompt and answer exceed the model's positions.
        """
        longest = max(self._lengths(problems))
        positions = self.model.config.text_config.max_position_embeddings
        if longest >= positions:
            raise ValueError(
                f"The longest prompt has {longest} tokens, which leaves no room for an answer in the model's "
                f"{positions} positions: take shorter problems."
            )
        if longest + self.max_new_tokens > positions:
            raise ValueError(
                f"The longest prompt has {longest} tokens, and `--max_new_tokens={self.max_new_tokens}` more exceed "
                f"the model's {positions} positions: lower it to {positions - longest}, or take shorter problems."
            )

    def longest_first(self, problems: Sequence[Problem]) -> list[Problem]:
        """The problems by the length of their prompts: little padding, and memory runs out at once or never."""
        lengths = self._lengths(problems)
        order = sorted(range(len(problems)), key=lambda number: -lengths[number])
        return [problems[number] for number in order]

    def _lengths(self, problems: Sequence[Problem]) -> list[int]:
        """Tokens of each problem's prompt."""
        texts = [self.prompt(problem) for problem in problems]
        return list(map(len, self.tokenizer(texts, add_special_tokens=False)["input_ids"]))

    def __call__(self, problems: Sequence[Problem], threshold: float) -> list[Answer]:
        """Answers B problems as one batch.

        Args:
            problems: B of them.
            threshold: the unmasking threshold.

        Raises:
            ValueError: `generate` refuses an option.
        """
        prompts = self.tokenizer(
            [self.prompt(problem) for problem in problems],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.model.device)
        width = prompts["input_ids"].shape[1]  # P
        stops = [StopTexts(self.tokenizer, ["\n```"], width)] if self.stop_at_fence else []
        with torch.inference_mode():
            output: Any = self.model.generate(
                input_ids=prompts["input_ids"],
                attention_mask=prompts["attention_mask"],
                max_new_tokens=self.max_new_tokens,
                unmasking_threshold=threshold,
                pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList(stops),
                **self.options,
            )
        answers = []
        for row in range(len(problems)):
            costs = count_costs(output, row)
            tokens = output.sequences[row, width : width + costs["new_tokens"]]
            answers.append(Answer(self.tokenizer.decode(tokens, skip_special_tokens=True), **costs))
        return answers
