"""A reply on its way to its reader: a block at a time, never in the way of those that are decoded beside it."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.utils import DirectStreamer, _StreamError
from transformers.generation.streamers import BaseStreamer

from ..modeling.outputs_relay import RelayGenerateOutput


class ReplyStream(BaseStreamer):
    """Turns tokens into texts in a queue, at the end also the bytes of a character that is not complete.

    The queue holds at most the whole reply, so that a slow reader holds up nobody. Nothing is raised where the tokens
    come from: what goes wrong ends this stream alone.

    Args:
        tokenizer: the model's tokenizer.
        loop: on which the reader is.
        texts: the queue. It gets texts, or what a parser makes of them, and at last None or a `_StreamError`.
        response_parser: of transformers, or None.

    Attributes:
        is_cancelled: nothing more is wanted.
        output: of `generate`, once the reply has ended.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        loop: asyncio.AbstractEventLoop,
        texts: asyncio.Queue,
        response_parser: Any = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.loop = loop
        self.texts = texts
        self.parses = response_parser is not None
        # transformers', which waits for the bytes that are missing.
        self.streamer = DirectStreamer(tokenizer.backend_tokenizer, loop, texts, response_parser=response_parser)
        self.tokens: list[int] = []
        self.is_cancelled = self.has_prompt = False
        self.output: RelayGenerateOutput | None = None

    @property
    def total_tokens(self) -> int:
        """Tokens of the reply so far."""
        return self.streamer.total_tokens

    def cancel(self) -> None:
        """Ends the stream, of which nobody reads any more."""
        self.is_cancelled = True

    def put(self, value: Tensor) -> None:
        """Takes the prompt first, then parts of the reply."""
        if self.has_prompt:
            self.tokens += value.flatten().tolist()
        self.has_prompt = True
        self._try(lambda: self.streamer.put(value))

    def end(self) -> None:
        """Does nothing: the stream ends with its output, so that whoever reads its end can read that, too."""

    def finish(self, output: RelayGenerateOutput) -> None:
        """Streams what is left of the text, and ends."""
        self.output = output
        self._try(self._end)

    def fail(self, error: Exception) -> None:
        """Ends the stream with what went wrong."""
        self.is_cancelled = True
        with contextlib.suppress(RuntimeError):  # the server has ended
            self._enqueue(_StreamError(str(error)))

    def _end(self) -> None:
        stream = DecodeStream([], skip_special_tokens=True)
        pieces = [stream.step(self.tokenizer.backend_tokenizer, token) for token in self.tokens]
        rest = self.tokenizer.decode(self.tokens, skip_special_tokens=True)[sum(len(piece or "") for piece in pieces) :]
        # A streamer that parses replies finishes its last region itself.
        if pieces and pieces[-1] is None and rest and not self.parses:
            self._enqueue(rest)
        self.streamer.end()

    def _enqueue(self, item: Any) -> None:
        self.loop.call_soon_threadsafe(self.texts.put_nowait, item)

    def _try(self, work: Callable[[], None]) -> None:
        if self.is_cancelled:
            return
        try:
            work()
        except Exception as error:
            self.fail(error)
