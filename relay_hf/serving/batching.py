"""Requests that are decoded side by side: they join at a block border, and leave at the one behind their last token.

Nothing here knows of HTTP or of threads, but for `add`, which any thread may call. Whoever decodes calls `turn` until
it says that nothing is left to do.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from ..modeling.generation_blocks_relay import BlockDecoder
from ..modeling.generation_given_relay import GivenBatch
from ..modeling.outputs_relay import RelayGenerateOutput

logger = logging.get_logger(__name__)

# Options that each row may have its own of; the others hold for all rows of a forward.
OF_ROWS = ("max_length", "max_new_tokens", "max_time", "sampling_seeds", "stop_strings")


def shared_options(options: GenerationConfig) -> str:
    """What two requests must have in common to be decoded side by side."""
    return repr(sorted((name, value) for name, value in options.to_dict().items() if name not in OF_ROWS))


class QueueFullError(RuntimeError):
    """As many requests are waiting as may."""


@dataclass(eq=False)
class Request:
    """A request on its way through a `Batcher`.

    Args:
        prepare: makes the decoder of its row, or raises what is wrong with it.
        options: what requests must have in common to be decoded side by side.
        finish: takes its output, or what went wrong. It may not raise.
        is_cancelled: whether nobody waits for it any more.
    """

    prepare: Callable[[], BlockDecoder]
    options: str
    finish: Callable[[RelayGenerateOutput | Exception], None]
    is_cancelled: Callable[[], bool]


@dataclass(eq=False)
class Group:
    """Requests that are decoded side by side.

    Args:
        decoder: decodes their rows.
        options: what they have in common.
        requests: the requests, and what the decoder calls them.
    """

    decoder: BlockDecoder
    options: str
    requests: dict[GivenBatch, Request] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Request) -> "Group":
        """A group of one request, which is prepared."""
        decoder = request.prepare()
        (batch,) = decoder.grid.batches
        return cls(decoder, request.options, {batch: request})

    def takes(self, other: "Group") -> bool:
        """Whether another group can join."""
        return self.options == other.options and self.decoder.can_join(other.decoder)

    def join(self, other: "Group") -> None:
        """Takes the requests of another group."""
        self.decoder.join(other.decoder)
        self.requests |= other.requests

    def drop_cancelled(self) -> None:
        """Takes out the requests that nobody waits for."""
        for batch in [batch for batch, request in self.requests.items() if request.is_cancelled()]:
            del self.requests[batch]
            self.decoder.drop(batch)


class Batcher:
    """Decodes requests, those with equal options side by side, and groups of others in turns of a block.

    Args:
        max_batch_size: the most requests that are decoded at a time.
        max_queue_size: the most that wait for that.
    """

    def __init__(self, max_batch_size: int, max_queue_size: int) -> None:
        self.max_batch_size = max_batch_size
        self.max_queue_size = max_queue_size
        self._arrived: deque[Request] = deque()
        self._waiting: list[Group] = []  # prepared, of one request each
        self._running: list[Group] = []  # the next to decode a block first

    @property
    def waiting(self) -> int:
        """How many requests are not being decoded yet."""
        return len(self._arrived) + len(self._waiting)

    @property
    def running(self) -> int:
        """How many requests are being decoded."""
        return sum(len(group.requests) for group in self._running)

    def add(self, request: Request) -> None:
        """Queues a request; any thread may call this.

        Raises:
            QueueFullError: as many are waiting as may.
        """
        if self.waiting >= self.max_queue_size + max(self.max_batch_size - self.running, 0):
            raise QueueFullError(f"{self.waiting} requests are waiting, as many as may: ask again later.")
        self._arrived.append(request)

    @torch.no_grad()
    def turn(self) -> bool:
        """Lets requests leave and join, and decodes a block of one group.

        Returns:
            Whether there is more to do.
        """
        self._drop_cancelled()
        self._prepare()
        self._admit()
        if self._running:
            self._decode_block()
        return bool(self._arrived or self._waiting or self._running)

    def _drop_cancelled(self) -> None:
        self._waiting = [
            group for group in self._waiting if not any(request.is_cancelled() for request in group.requests.values())
        ]
        for group in list(self._running):
            self._try([group], group.drop_cancelled)
            self._end_if_empty(group)

    def _prepare(self) -> None:
        """Prepares what has arrived, so that what is wrong with a request is known however long others take."""
        while self._arrived:
            request = self._arrived.popleft()
            if not request.is_cancelled():
                try:
                    self._waiting.append(Group.of(request))
                except Exception as error:
                    request.finish(error)

    def _admit(self) -> None:
        """Prefills the requests that there is room for, and lets them join."""
        entering: list[Group] = []
        for group in self._next():
            self._waiting.remove(group)
            # Prompts of equally many blocks are prefilled together; others would only be padded.
            fits = (other for other in entering if other.takes(group) and _blocks(other) == _blocks(group))
            if (other := next(fits, None)) is None:
                entering.append(group)
            elif not self._try([other, group], other.join, group):
                entering.remove(other)
        for group in entering:
            if not self._try([group], group.decoder.prefill):
                continue
            if (other := next((other for other in self._running if other.takes(group)), None)) is None:
                self._running.append(group)
            elif not self._try([other, group], other.join, group):
                self._running.remove(other)

    def _next(self) -> list[Group]:
        """The waiting groups that there is room for, first come, first served.

        Of those that nobody can join only one is decoded at a time: static steps have memory for one.
        """
        chosen: list[Group] = []
        is_taken = any(not group.decoder.takes_rows for group in self._running)
        for group in self._waiting:
            if self.running + len(chosen) >= self.max_batch_size:
                break
            if group.decoder.takes_rows or not is_taken:
                chosen.append(group)
                is_taken |= not group.decoder.takes_rows
        return chosen

    def _decode_block(self) -> None:
        group = self._running.pop(0)
        self._running.append(group)
        ended: list[tuple[Request, RelayGenerateOutput]] = []

        def decode() -> None:
            for batch in group.decoder.step_block():
                ended.append((group.requests[batch], group.decoder.output(batch)))
                del group.requests[batch]

        self._try([group], decode)
        for request, output in ended:
            request.finish(output)
        self._end_if_empty(group)

    def _end_if_empty(self, group: Group) -> None:
        if not group.requests:
            self._running.remove(group)
            self._try([group], group.decoder.finish)

    def _try(self, groups: list[Group], work: Callable[..., Any], *arguments: Any) -> bool:
        """Works for these groups; whether that went well. If not, their requests end with what went wrong."""
        try:
            work(*arguments)
        except Exception as error:
            logger.error("Requests could not be decoded.", exc_info=error)
            for group in groups:
                for request in group.requests.values():
                    request.finish(error)
                group.requests.clear()
            return False
        return True


def _blocks(group: Group) -> int:
    """Columns of the whole blocks of the longest prompt, before its prefill."""
    return group.decoder.grid.begin
