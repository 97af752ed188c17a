"""What can be chosen on the command lines of `relay-hf eval` and `relay-hf compare`."""

import json
from dataclasses import dataclass
from typing import Any

from ...startup.options import option, require_at_least
from .chat_prompt import ChatPrompt
from .sandbox import Limits

# Options of `generate` with arguments of their own here, or one value that an evaluation can use.
DECIDED = {
    "attention_mask", "do_sample", "input_ids", "max_new_tokens", "num_return_sequences", "pad_token_id",
    "return_dict_in_generate", "stopping_criteria", "unmasking_threshold",
}  # fmt: skip


@dataclass
class CodeEvalArguments:
    """Arguments of an evaluation; 2048 new tokens are those of the published numbers."""

    benchmark: str = option("humaneval", "humaneval, or a file in the format of HumanEval or MBPP.")
    output_dir: str = option("runs/eval", "Where answers and results are written; the same again resumes.")
    thresholds: list[float] = option(list, "Unmasking thresholds to try; by default the model's own.")
    max_new_tokens: int = option(2048, "Longest answer.")
    batch_size: int = option(8, "Problems that are answered at once.")
    limit: int | None = option(None, "Only the first problems, for a quick look.")
    stop_at_fence: bool = option(False, "End an answer with its first code block instead of the stop token.")
    instruction: str = option(ChatPrompt.instruction, "What the user says before a problem.")
    answer_start: str = option(ChatPrompt.answer_start, "What the assistant says before its code block.")
    generation_options: str = option("{}", """Further options of `generate` in JSON, e.g. '{"use_relay": false}'.""")
    time_limit: float = option(Limits.seconds, "Seconds that a program may run.")
    memory_limit: int = option(Limits.memory, "MiB of memory that a program may take.")
    device: str = option("auto", "Where the model runs, for instance cpu or cuda:0.")
    dtype: str = option("auto", "Its dtype, for instance bfloat16; auto is the saved one.")

    def __post_init__(self) -> None:
        require_at_least(1, self, "max_new_tokens", "batch_size", "limit")
        if not isinstance(self.options, dict):
            raise ValueError(f"`--generation_options={self.generation_options}` must be a JSON object.")
        if taken := sorted(DECIDED.intersection(self.options)):
            raise ValueError(f"`--generation_options` sets {taken}, which the evaluation decides: leave them out.")
        if len(set(self.thresholds)) < len(self.thresholds):
            raise ValueError(f"`--thresholds {self.thresholds}` names one twice: leave it out.")
        self.limits  # noqa: B018  (raises)

    @property
    def options(self) -> dict[str, Any]:
        """`generation_options` as keyword arguments of `generate`."""
        try:
            return json.loads(self.generation_options)
        except ValueError as error:
            raise ValueError(f"`--generation_options={self.generation_options}` is not JSON: {error}.") from error

    @property
    def chat_prompt(self) -> ChatPrompt:
        """The words around a problem."""
        return ChatPrompt(self.instruction, self.answer_start)

    @property
    def limits(self) -> Limits:
        """Of each program."""
        return Limits(self.time_limit, self.memory_limit)


@dataclass
class CompareArguments:
    """Arguments of a comparison."""

    picture: str | None = option(None, "PNG file to draw accuracy against forwards of both runs in.")
