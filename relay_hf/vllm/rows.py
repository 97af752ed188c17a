"""What each request is at. A request has a row of persistent tensors as long as it runs; a step reads and writes rows.

Legend: R rows, S positions of a block, W width of the relay state, K stop tokens.
"""

import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import reads_before_block
from .internals import async_tensor_h2d
from .options import OptionReader, RequestOptions
from .scheduler import EARLIER_FORWARDS

# No number of a sub-block.
NOWHERE = -1
NO_TOKEN = -1


class Fixed(NamedTuple):
    """What does not change while a request runs, one number for each row, long.

    Attributes:
        prompt_end: position of the first new token.
        end: position behind the last token.
        size: positions of a sub-block.
        seed: what its drawn tokens depend on.
        uses_relay: 1, or 0 if nothing is to be carried.
    """

    prompt_end: Tensor
    end: Tensor
    size: Tensor
    seed: Tensor
    uses_relay: Tensor


class Moving(NamedTuple):
    """What changes from step to step, one number for each row, long.

    Attributes:
        begin: position at which the block in work begins.
        forwards: denoise forwards so far.
        sub_block: number of the sub-block that the last step was about.
        step: steps of that sub-block.
        positions: positions that these steps have to reveal in all.
        masks_at_begin: masks at the block's first step, at least 1.
        commits: 1 if the next forward commits the block.
        has_state: 1 if a forward has left a state for the next one.
    """

    begin: Tensor
    forwards: Tensor
    sub_block: Tensor
    step: Tensor
    positions: Tensor
    masks_at_begin: Tensor
    commits: Tensor
    has_state: Tensor


class Rows:
    """The rows of all requests that run.

    Args:
        count: R, requests that run at a time at most.
        config: the model's `RelayConfig`.
        reader: reads the options of requests.
        dtype: of the backbone.
        device: of the tensors.

    Attributes:
        fixed: (R, F) long, the columns of `Fixed`.
        stops: (R, K) long, tokens that end a row, filled up with `NO_TOKEN`; K grows with the requests.
        moving: (R, M) long, the columns of `Moving`.
        canvas: (R, S) long, the block in work, [MASK] where nothing is revealed yet.
        state: (R, S, W) the relay state that the last forward left.
        last_hidden: (R + 1, D) raw output at the position before the block, if it is kept; nobody reads the last row.
        sizes: (R,) on the host, positions of a sub-block.
        groups: (R,) on the host, number of the row's options in `options`.
        options: the options of requests, by number; requests of equal ones share a number.
        has_hidden: whether `last_hidden` is kept.
    """

    def __init__(self, count: int, config: Any, reader: OptionReader, dtype: torch.dtype, device: torch.device) -> None:
        size, width = config.block_size, config.text_config.hidden_size
        self.config, self.reader, self.device = config, reader, device
        self.fixed = torch.zeros(count, len(Fixed._fields), dtype=torch.long, device=device)
        self.stops = torch.full((count, 1), NO_TOKEN, dtype=torch.long, device=device)
        self.moving = torch.zeros(count, len(Moving._fields), dtype=torch.long, device=device)
        self.canvas = torch.full((count, size), config.mask_token_id, dtype=torch.long, device=device)
        self.state = torch.zeros(count, size, config.relay_state_width, dtype=dtype, device=device)
        self.has_hidden = reads_before_block(config)
        self.last_hidden = torch.zeros(count + 1, width if self.has_hidden else 0, dtype=dtype, device=device)
        self.sizes = np.zeros(count, dtype=np.int64)
        self.groups = np.zeros(count, dtype=np.int64)
        self.options: dict[int, RequestOptions] = {}
        self._numbers: dict[str, int] = {}
        self._members: dict[int, int] = {}
        self._slots: dict[str, int] = {}
        self._staged: list[list[int]] = []

    def add(self, slot: int, request: Any) -> None:
        """Takes a request into a row; `flush` writes it to the device.

        Args:
            slot: the row.
            request: vLLM's `NewRequestData`, of a new request or one that comes back after preemption.
        """
        params, prompt = request.sampling_params, len(request.prompt_token_ids or [])
        extra = dict(params.extra_args or {})
        forwards = extra.pop(EARLIER_FORWARDS, 0)
        options = self.reader.read(extra)
        size = options.decoding.sub_block_size or self.config.block_size
        number = self._numbers.setdefault(options.key, max(self._numbers.values(), default=-1) + 1)
        self.options[number] = options
        self._members[number] = self._members.get(number, 0) + 1
        self._slots[request.req_id] = slot
        self.sizes[slot], self.groups[slot] = size, number
        stops = sorted({params.eos_token_id, *(params.stop_token_ids or ())} - {None})
        seed = seed_of(request.req_id) if options.seed is None else options.seed
        # As `Fixed` and `Moving` name them.
        fixed = [prompt, prompt + (params.max_tokens or 1), size, seed, int(options.decoding.use_relay)]
        moving = [0, forwards, NOWHERE, 0, 0, 1, 0, 0]
        self._staged.append([slot, *fixed, *moving, *stops])

    def remove(self, req_id: str) -> None:
        """Forgets a request that has ended or waits again; unknown ones are none of ours."""
        slot = self._slots.pop(req_id, None)
        if slot is None:
            return
        number = int(self.groups[slot])
        self._members[number] -= 1
        if not self._members[number]:
            key = self.options.pop(number).key
            del self._members[number], self._numbers[key]

    def flush(self) -> None:
        """Writes the new requests' rows to the device, all at once."""
        if not self._staged:
            return
        head = 1 + len(Fixed._fields) + len(Moving._fields)
        most = max(len(row) - head for row in self._staged)
        if most > self.stops.shape[1]:
            room = self.stops.new_full((len(self.stops), most - self.stops.shape[1]), NO_TOKEN)
            self.stops = torch.cat([self.stops, room], dim=1)
        width = head + self.stops.shape[1]
        staged = np.array([row + [NO_TOKEN] * (width - len(row)) for row in self._staged], dtype=np.int64)
        self._staged = []
        rows = async_tensor_h2d(staged, device=self.device)
        slots, fixed, moving, stops = rows.split([1, len(Fixed._fields), len(Moving._fields), width - head], dim=1)
        for target, source in ((self.fixed, fixed), (self.moving, moving), (self.stops, stops)):
            target.index_copy_(0, slots[:, 0], source)

    def read_fixed(self, slots: Tensor) -> Fixed:
        return Fixed(*self.fixed[slots].unbind(1))

    def read_moving(self, slots: Tensor) -> Moving:
        return Moving(*self.moving[slots].unbind(1))

    def write_moving(self, slots: Tensor, moving: Moving) -> None:
        self.moving.index_copy_(0, slots, torch.stack([each.long() for each in moving], dim=1))


def seed_of(req_id: str) -> int:
    """The seed of a request that gives none: one for each id, the same in all processes."""
    return int.from_bytes(hashlib.blake2b(req_id.encode(), digest_size=7).digest(), "little")
