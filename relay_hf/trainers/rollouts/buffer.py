"""The rollout buffer: rows that live across optimizer steps until they are fully revealed, and rows that wait."""

import torch
from torch import Tensor

from ...modeling import RelayConfig
from .batches import TextRow, cut_padding, read_batch
from .noise import stagger
from .rows import FIELDS, MAIN_MEMORY, RolloutRows, all_masked, blank_rows

COUNTS = "counts"  # in the state dictionary
QUEUED = ("queue_ids", "queue_learned", "queue_reveal_steps")  # there, the fields of `TextRow`
# Name in checkpoints of earlier versions -> name today.
RENAMED = {"maskable": "learned", "queue_maskable": "queue_learned"}


class RolloutBuffer:
    """A fixed number of rows in slots; the row that has waited longest replaces a finished one.

    A row needs many rollouts, and every batch brings new rows: rows that find no free slot wait in a queue of bounded
    length. Rows in slots are padded on the right to the longest row; rows in the queue have no padding and stay in
    main memory.

    Args:
        config: configuration of the model.
        keeps_state: whether the rows keep the state that a step leaves.
        queue_size: number of rows that may wait; rows that arrive when the queue is full are dropped. 0 drops every
            row that finds no free slot, as the published code does.
        staggered: whether the first rows start with different fractions of their positions revealed, so that they do
            not all finish together.
        device: where the rows in slots are.
    """

    def __init__(
        self,
        config: RelayConfig,
        keeps_state: bool,
        queue_size: int = 0,
        staggered: bool = False,
        device: torch.device = MAIN_MEMORY,
    ) -> None:
        self.config = config
        self.keeps_state = keeps_state
        self.queue_size = queue_size
        self.staggered = staggered
        self.device = device
        self.rows: RolloutRows | None = None
        self.queue: list[TextRow] = []
        self.entered = self.dropped = 0  # rows since the first batch

    def refill(self, batch: dict[str, Tensor], slots: int | None = None) -> int:
        """Queues the rows of `batch` and replaces finished rows.

        Args:
            batch: tensors as `read_batch` takes them, of any shape.
            slots: number of slots from now on; None = unchanged, and at first the number of rows of `batch`.

        Returns:
            Number of rows that were replaced.

        Raises:
            ValueError: `read_batch` refuses the batch.
        """
        incoming = read_batch(batch, self.config)
        self.queue += [row for row in incoming if row[1].any()]
        is_cold = self.rows is None
        if is_cold:
            self.rows = self._blank(slots or len(incoming), has_trace=incoming[0].reveal_steps is not None)
        elif slots is not None and slots != len(self.rows):
            self._resize(slots)
        # All that the host has to know of the slots, in one transfer.
        finished, lengths = torch.stack([self.rows.is_finished, self.rows.attention_mask.sum(-1)]).tolist()
        free = [slot for slot, is_free in enumerate(finished) if is_free][: len(self.queue)]
        if free:
            fresh = all_masked(self.config, self.queue[: len(free)], self.keeps_state, self.device)
            del self.queue[: len(free)]
            kept = [length for slot, length in enumerate(lengths) if slot not in free]
            # Without trimming, the longest row ever seen would set the cost of every later step.
            longest = max([fresh.clean_ids.shape[1], *kept])
            self._put(stagger(fresh) if is_cold and self.staggered else fresh, longest)
        self.entered += len(free)
        self.dropped += len(self.queue[self.queue_size :])
        del self.queue[self.queue_size :]
        return len(free)

    def store(self, rows: RolloutRows) -> None:
        """Stores the rows as the rollout left them."""
        self.rows = rows

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the rows and of the queue by name; empty before the first batch."""
        if self.rows is None:
            return {}
        tensors = {name: getattr(self.rows, name) for name in FIELDS}
        tensors[COUNTS] = torch.tensor([self.entered, self.dropped])
        if self.queue:
            for name, column in zip(QUEUED, zip(*self.queue, strict=True), strict=True):
                tensors[name] = None if column[0] is None else torch.cat(column)
            tensors["queue_lengths"] = torch.tensor([len(row.ids) for row in self.queue])
        return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores a dictionary that `state_dict` returned, in this version or an earlier one.

        Raises:
            ValueError: exactly one of the two objectives, of the checkpoint and of this run, keeps a state; or the
                checkpoint is of another model or tokenizer, or damaged.
        """
        state = {RENAMED.get(name, name): tensor for name, tensor in state.items()}
        if state and self.keeps_state != ("relay_state" in state):
            raise ValueError(
                "The checkpoint's rollout buffer is of another objective, which this run cannot go on with: load the "
                "checkpoint as a model and start a new run, or delete its `rollout_buffer_*.safetensors`."
            )
        self._check_state(state)
        self.rows = RolloutRows(**{name: state.get(name) for name in FIELDS}) if state else None
        self.entered, self.dropped = state[COUNTS].tolist() if COUNTS in state else (0, 0)
        self.queue = []
        if "queue_ids" in state:
            lengths = state["queue_lengths"].tolist()
            columns = (state[name].cpu().split(lengths) for name in QUEUED if name in state)
            self.queue = [TextRow(*row) for row in zip(*columns, strict=True)]

    def _check_state(self, state: dict[str, Tensor]) -> None:
        if not state:
            return
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

    def _resize(self, slots: int) -> None:
        """Changes the number of slots after a resume with another batch size: surplus rows go back into the queue."""
        surplus = self.rows.map(lambda tensor: tensor[slots:])
        unfinished = surplus.map(lambda tensor: tensor[~surplus.is_finished])
        again = cut_padding(
            unfinished.attention_mask, unfinished.clean_ids, unfinished.learned, unfinished.reveal_steps
        )
        self.queue[:0] = again
        self.entered -= len(again)
        self.rows = self.rows.map(lambda tensor: tensor[:slots])
        if missing := slots - len(self.rows):
            blank = self._blank(missing, has_trace=self.rows.reveal_steps is not None)
            self.rows = self.rows.map(lambda *tensors: torch.cat(tensors), blank.fit(self.rows.clean_ids.shape[1]))

    def _blank(self, count: int, has_trace: bool) -> RolloutRows:
        return blank_rows(self.config, count, self.keeps_state, self.device, has_trace)

    def _put(self, fresh: RolloutRows, length: int) -> None:
        """Puts rows in place of the first finished ones, and gives all of them a length."""
        slots = torch.nonzero_static(self.rows.is_finished, size=len(fresh))[:, 0]
        self.rows = self.rows.fit(length).map(lambda kept, new: kept.index_copy(0, slots, new), fresh.fit(length))
