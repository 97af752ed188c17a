"""What the page runs: a puzzle or a prompt, once with the relay and once without, kept to be replayed."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from ...loading.tokenizer import encode_prompt
from ...modeling import RelayConfig, RelayForMaskedDiffusion
from ...modeling.generation_options_relay import GREEDY
from ...pictures.timeline import Timeline, read_history
from ...tasks.sudoku import BoardShape, is_legal, make_sudoku_tokenizer, parse_question, questions_to_ids
from ...tasks.sudoku.board import read_boards


@dataclass(frozen=True)
class Run:
    """One finished call of `generate`.

    Args:
        timeline: which denoise forward revealed which token, from the first position on.
        commits, prefills: forwards of the other two kinds; those that denoise are `timeline.forwards`.
    """

    timeline: Timeline
    commits: int
    prefills: int

    @property
    def is_solved(self) -> bool:
        """Whether the text is a legal Sudoku board; a model may also write its padding token into a cell."""
        board = "".join(self.timeline.tokens)
        return bool(is_legal(read_boards([board], BoardShape.of_cells(len(board))))[0])


@dataclass(frozen=True)
class Runs:
    """The same input without the relay, and with it: None if the model has no channel."""

    off: Run
    on: Run | None

    @property
    def forwards(self) -> int:
        """Denoise forwards of the longer run."""
        return max(run.timeline.forwards for run in (self.off, self.on) if run is not None)


# Receives the completed fraction of both runs, in [0, 1].
Progress = Callable[[float], None]


class _Watcher(BaseStreamer):
    """Reports the progress of a run, whenever a block is written.

    Args:
        progress: receives the completed fraction, in [0, 1].
        tokens: the most tokens that the run writes.
        begin, end: completed fractions before and after the run.
    """

    def __init__(self, progress: Progress, tokens: int, begin: float, end: float) -> None:
        self.progress, self.tokens, self.bounds = progress, tokens, (begin, end)
        self.seen = -1  # tokens so far; the prompt comes first

    def put(self, value: Tensor) -> None:
        self.seen = 0 if self.seen < 0 else self.seen + value.numel()
        begin, end = self.bounds
        self.progress(begin + (end - begin) * min(self.seen / self.tokens, 1.0))

    def end(self) -> None:
        self.progress(self.bounds[1])


class Runner:
    """A model with its tokenizer, one request at a time.

    Args:
        model: a model in evaluation mode.
        tokenizer: its tokenizer, with the model's mask token.
    """

    def __init__(self, model: RelayForMaskedDiffusion, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.has_channel = model.config.relay_channel != "none"
        self.board_size = _board_size(model.config, tokenizer)
        self._turn = threading.Lock()

    def solve(self, question: str, threshold: float, progress: Progress = lambda done: None) -> Runs:
        """Fills in a Sudoku board.

        Args:
            question: row by row, "." or "0" for a blank; spaces and line breaks are skipped.
            threshold: the unmasking threshold.
            progress: receives the completed fraction, in [0, 1].

        Raises:
            ValueError: the text is no puzzle of the model's size, its clues contradict each other, or it has no blanks.
        """
        question = "".join(question.split())
        parse_question(question)
        if (size := BoardShape.of_cells(len(question)).size) != self.board_size:
            raise ValueError(
                f"The puzzle is {size}x{size}, but this model fills in {self.board_size}x{self.board_size} boards: "
                f"write {self.board_size**2} characters."
            )
        if not set(question) & set(".0"):
            raise ValueError('The puzzle has no blanks, so there is nothing to fill in: write some as ".".')
        return self._compare(questions_to_ids([question], self.tokenizer), threshold, len(question), progress)

    def write(self, prompt: str, new_tokens: int, threshold: float, progress: Progress = lambda done: None) -> Runs:
        """Continues a text; with a chat template it answers a message.

        Args:
            prompt: the text, or the message.
            new_tokens: at most this many are written.
            threshold: the unmasking threshold.
            progress: receives the completed fraction, in [0, 1].

        Raises:
            ValueError: the prompt is empty, or leaves no room for the new tokens.
        """
        if not prompt:
            raise ValueError("The prompt is empty: write at least one character.")
        ids = encode_prompt(self.tokenizer, prompt)["input_ids"]
        room = self.model.config.text_config.max_position_embeddings - ids.shape[1]
        if new_tokens > room:
            raise ValueError(
                f"The prompt has {ids.shape[1]} tokens and leaves room for {max(room, 0)} more, not for {new_tokens}: "
                "shorten one of them."
            )
        return self._compare(ids, threshold, new_tokens, progress, max_new_tokens=new_tokens)

    def _compare(self, ids: Tensor, threshold: float, tokens: int, progress: Progress, **options: Any) -> Runs:
        options["unmasking_threshold"] = threshold
        half = 0.5 if self.has_channel else 1.0
        with self._turn:
            # A relay that is off has no start, whatever the model's own options say.
            off = self._run(ids, _Watcher(progress, tokens, 0, half), use_relay=False, relay_start=None, **options)
            on = (
                self._run(ids, _Watcher(progress, tokens, half, 1), use_relay=True, **options)
                if self.has_channel
                else None
            )
        return Runs(off, on)

    def _run(self, ids: Tensor, watcher: _Watcher, **options: Any) -> Run:
        """One row, (1, L), greedily: drawn tokens would differ between the two runs for no reason of the relay."""
        stop, pad = self.model.generation_config.eos_token_id, self.tokenizer.pad_token_id
        ids = ids.to(self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                eos_token_id=self.tokenizer.eos_token_id if stop is None else stop,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                return_dict_in_generate=True,
                output_history=True,
                streamer=watcher,
                **GREEDY,
                **options,
            )
        tokens = self.tokenizer.batch_decode(output.sequences[0][:, None])
        timeline = read_history(output.history, tokens, row=0)
        return Run(timeline, int(output.commit_forwards[0]), int(output.prefill_forwards[0]))


def _board_size(config: RelayConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Of the Sudoku boards that the model fills in; None if it writes text."""
    if config.block_size is not None:
        return None
    vocabulary = tokenizer.get_vocab()
    return next((size for size in (4, 6, 9) if make_sudoku_tokenizer(size).get_vocab() == vocabulary), None)
