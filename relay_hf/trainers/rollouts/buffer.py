"""The rollout buffer: rows that live across optimizer steps until they are fully revealed."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...modeling import RelayConfig
from .batches import NO_NUMBER, NumberedRow, TextRow, cut_padding
from .noise import stagger
from .rows import FIELDS, MAIN_MEMORY, RolloutRows, all_masked, blank_rows

ENTERED = "entered"  # in the state dictionary, like the names of `FIELDS`
QUEUED = ("queue_ids", "queue_learned", "queue_reveal_steps")  # there, the fields of `TextRow`
# Name in checkpoints of earlier versions -> name today.
RENAMED = {"maskable": "learned", "queue_maskable": "queue_learned"}


class RolloutBuffer:
    """A fixed number of rows in slots; new ones are drawn where a row is finished.

    Rows in slots are padded on the right to the longest row. A few rows that were drawn and found no place wait in a
    queue; they have no padding and stay in main memory.

    Args:
        config: configuration of the model.
        keeps_state: whether the rows keep the state that a step leaves.
        staggered: whether the first rows start with different fractions of their positions revealed, so that they do
            not all finish together. They come again, with nothing revealed, and are not counted before.
        drops_rows: whether rows that find no place are dropped, as in the published code.
        device: where the rows in slots are.
        has_traces: whether all rows have a trace.

    Attributes:
        numbers: of the row in each slot; `NO_NUMBER` = none, or it is not counted.
        entered, learned: rows that have come into slots, and how many positions of them are learned.
        lengths: positions of the text in each slot that are seen, 0 if it is finished; None = not counted here.
    """

    def __init__(
        self,
        config: RelayConfig,
        keeps_state: bool,
        staggered: bool = False,
        drops_rows: bool = False,
        device: torch.device = MAIN_MEMORY,
        has_traces: bool = False,
    ) -> None:
        self.config = config
        self.keeps_state = keeps_state
        self.staggered = staggered
        self.drops_rows = drops_rows
        self.device = device
        self.has_traces = has_traces
        self.rows: RolloutRows | None = None
        self.numbers: list[int] = []
        self.queue: list[NumberedRow] = []
        self.entered = self.learned = 0
        self.lengths: list[int] | None = None
        self._seen: list[list[int]] | None = None  # masked positions and length of each slot, on the host

    def refill(self, source: Iterator[list[NumberedRow]], slots: int) -> int:
        """Draws rows for the slots whose rows are finished.

        Args:
            source: batches of rows; the next one is drawn when no row waits.
            slots: number of slots from now on.

        Returns:
            Number of rows that came in.
        """
        is_cold = self.rows is None
        self._set_slots(slots)
        left, lengths = self.look()
        free = [slot for slot, count in enumerate(left) if not count]
        entering: list[NumberedRow] = []
        while self._has_next(source, free, entering):
            entering.append(self.queue.pop(0))
        if entering:
            kept = [length for slot, length in enumerate(lengths) if slot not in free[: len(entering)]]
            self._enter(entering, free, kept, is_staggered=is_cold and self.staggered)
        if self.drops_rows:
            self.queue.clear()
        return len(entering)

    def store(self, rows: RolloutRows) -> None:
        """Stores the rows as the rollout left them."""
        self.rows, self._seen = rows, None

    def look(self) -> list[list[int]]:
        """For each slot the number of masked positions, and the length; waits for the device, once after a rollout."""
        if self._seen is None:
            counts = torch.stack([self.rows.masked.sum(-1), self.rows.attention_mask.sum(-1)])
            self._seen = counts.tolist()
        return self._seen

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the counted rows that are here and not fully revealed."""
        in_slots = zip(self.numbers, self.look()[0], strict=True) if self.rows is not None else ()
        numbers = [number for number, left in in_slots if left] + [number for number, _ in self.queue]
        return [number for number in numbers if number != NO_NUMBER]

    @property
    def revealed(self) -> int:
        """Positions that were revealed so far."""
        return self.learned - (sum(self.look()[0]) if self.rows is not None else 0)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the rows and of the queue by name; empty before the first row."""
        if self.rows is None:
            return {}
        tensors = {name: getattr(self.rows, name) for name in FIELDS}
        tensors["numbers"], tensors[ENTERED] = torch.tensor(self.numbers), torch.tensor([self.entered, self.learned])
        if self.queue:
            numbers, texts = zip(*self.queue, strict=True)
            for name, column in zip(QUEUED, zip(*texts, strict=True), strict=True):
                tensors[name] = None if column[0] is None else torch.cat(column)
            tensors["queue_lengths"] = torch.tensor([len(text.ids) for text in texts])
            tensors["queue_numbers"] = torch.tensor(numbers)
        return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores a dictionary that `state_dict` returned, in this version or an earlier one, which had no numbers.

        Raises:
            ValueError: exactly one of the two objectives, of the checkpoint and of this run, keeps a state, or follows
                traces; or the checkpoint is of another model or tokenizer, or damaged.
        """
        state = {RENAMED.get(name, name): tensor for name, tensor in state.items()}
        self._check_state(state)
        self.queue, self._seen = [], None
        self.rows = RolloutRows(**{name: state.get(name) for name in FIELDS}) if state else None
        count = len(self.rows) if state else 0
        self.numbers = state["numbers"].tolist() if "numbers" in state else [NO_NUMBER] * count
        # Of earlier versions nothing is known but the rows that are here.
        here = torch.tensor([count, int(self.rows.learned.sum()) if state else 0])
        self.entered, self.learned = state.get(ENTERED, here).tolist()
        if "queue_ids" in state:
            lengths = state["queue_lengths"].tolist()
            columns = (state[name].cpu().split(lengths) for name in QUEUED if name in state)
            texts = [TextRow(*row) for row in zip(*columns, strict=True)]
            numbers = state.get("queue_numbers", torch.full((len(lengths),), NO_NUMBER)).tolist()
            self.queue = list(zip(numbers, texts, strict=True))

    def take_over(self, state: dict[str, Tensor], counts: bool) -> Tensor:
        """Takes the place of the buffer of another process, but not its rows: they begin again, in whatever process.

        Args:
            state: of that buffer.
            counts: whether what it has finished counts here; it has to in one process.

        Returns:
            (rows,) numbers of its rows that are not finished.
        """
        other = RolloutBuffer(self.config, self.keeps_state, has_traces=self.has_traces)
        other.load_state_dict(state)
        if counts and other.rows is not None:
            in_work = ~other.rows.is_finished
            self.entered += other.entered - int(in_work.sum())
            self.learned += other.learned - int(other.rows.learned[in_work].sum())
        return torch.tensor(other.unfinished, dtype=torch.long)

    def _check_state(self, state: dict[str, Tensor]) -> None:
        if not state:
            return
        if (self.keeps_state, self.has_traces) != ("relay_state" in state, "reveal_steps" in state):
            raise ValueError(
                "The checkpoint's rollout buffer is of another objective, which this run cannot go on with: load the "
                "checkpoint as a model and start a new run, or delete its `rollout_buffer_*.safetensors`."
            )
        ids, others = state.get("clean_ids"), [state.get(name) for name in ("learned", "attention_mask", "masked")]
        relay_state, vocab_size = state.get("relay_state"), self.config.text_config.vocab_size
        texts = [tensor for tensor in (ids, state.get("queue_ids")) if tensor is not None and tensor.numel()]
        fits = ids is not None and all(other is not None and other.shape == ids.shape for other in others)
        fits = fits and (relay_state is None or relay_state.shape == (*ids.shape, self.config.relay_state_width))
        fits = fits and all(int(t.min()) >= 0 and int(t.max()) < vocab_size for t in texts)
        # Only what is learned counts: a prompt may have a [MASK], and the last block is filled with them.
        if not fits or bool((state["learned"] & (ids == self.config.mask_token_id)).any()):
            raise ValueError(
                "The checkpoint's rollout buffer is damaged, or of another model or tokenizer: resume with the model "
                "that it was trained with, or delete its `rollout_buffer_*.safetensors`."
            )

    def _blank(self, count: int) -> RolloutRows:
        return blank_rows(self.config, count, self.keeps_state, self.device, self.has_traces)

    def _is_waiting(self, source: Iterator[list[NumberedRow]]) -> bool:
        """Whether a row waits; if none does, draws the next batch."""
        while not self.queue and (batch := next(source, None)) is not None:
            self.queue += batch
        return bool(self.queue)

    def _has_next(self, source: Iterator[list[NumberedRow]], free: list[int], entering: list[NumberedRow]) -> bool:
        """Whether a row waits for which there is a place beside those that enter; none is read before there is."""
        return len(entering) < len(free) and self._is_waiting(source)

    def _enter(self, rows: list[NumberedRow], free: list[int], kept: list[int], is_staggered: bool) -> None:
        """Puts rows into the first free slots; `kept` has the lengths of the rows that stay."""
        numbers, texts = [number for number, _ in rows], [text for _, text in rows]
        fresh = all_masked(self.config, texts, self.keeps_state, self.device)
        # Without trimming, the longest row ever seen would set the cost of every later step.
        length = max([fresh.clean_ids.shape[1], *kept])
        if is_staggered:
            fresh, numbers = stagger(fresh), [NO_NUMBER] * len(rows)
            self.queue[:0] = rows
        slots = torch.nonzero_static(self.rows.is_finished, size=len(fresh))[:, 0]
        self.rows = self.rows.fit(length).map(lambda kept, new: kept.index_copy(0, slots, new), fresh.fit(length))
        for slot, number in zip(free, numbers, strict=False):
            self.numbers[slot] = number
        self.entered += len(rows)
        self.learned += sum(int(text.learned.sum()) for text in texts)
        self._seen = None

    def _set_slots(self, slots: int) -> None:
        if self.rows is None:
            # A row of no text has the width of a block, so that a process without any row can take part in a step.
            self.rows = self._blank(slots).fit(self.config.block_size or 1)
            self.numbers = [NO_NUMBER] * slots
        elif slots != len(self.rows):
            self._resize(slots)

    def _resize(self, slots: int) -> None:
        """Changes the number of slots after a resume with another batch size: surplus rows wait, to begin again."""
        surplus = self.rows.map(lambda tensor: tensor[slots:])
        is_open = ~surplus.is_finished
        unfinished = surplus.map(lambda tensor: tensor[is_open])
        texts = cut_padding(
            unfinished.attention_mask, unfinished.clean_ids, unfinished.learned, unfinished.reveal_steps
        )
        numbers = [number for number, is_open in zip(self.numbers[slots:], is_open.tolist(), strict=True) if is_open]
        self.queue[:0] = zip(numbers, texts, strict=True)
        self.entered -= len(texts)
        self.learned -= sum(int(text.learned.sum()) for text in texts)
        missing = max(slots - len(self.rows), 0)
        self.rows = self.rows.map(lambda tensor: tensor[:slots])
        self.numbers = self.numbers[:slots] + [NO_NUMBER] * missing
        if missing:
            blank = self._blank(missing).fit(self.rows.clean_ids.shape[1])
            self.rows = self.rows.map(lambda *tensors: torch.cat(tensors), blank)
        self._seen = None
