"""The rollout buffer: rows that live across optimizer steps until they are fully revealed, and rows that wait."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..modeling import RelayConfig
from .noise import stagger
from .rows import FIELDS, RolloutRows, fresh_rows

COUNTS = "counts"  # in the state dictionary


class RolloutBuffer:
    """A fixed number of rows, each replaced when it is finished by the one that has waited longest.

    A row needs many rollouts, and every batch brings new rows: those that find no place wait in a queue of bounded
    length. Rows in the buffer are padded on the right to the longest; rows in the queue have no padding and stay in
    main memory.

    Args:
        config: the model's configuration.
        carries_state: whether the objective uses the relay channel.
        queue_size: rows that may wait; what comes when the queue is full is dropped. 0 drops every incoming row that
            finds no place, as the published reference does.
        staggered: the first rows start with different fractions of their positions revealed, so that they do not all
            finish together.
    """

    def __init__(self, config: RelayConfig, carries_state: bool, queue_size: int = 0, staggered: bool = False) -> None:
        self.config = config
        self.carries_state = carries_state
        self.queue_size = queue_size
        self.staggered = staggered
        self.rows: RolloutRows | None = None
        self.queue: list[tuple[Tensor, Tensor]] = []  # (L,) text and (L,) bool, what is learned of it
        self.entered = self.dropped = 0  # rows since the first batch

    def refill(self, batch: dict[str, Tensor], slots: int | None = None) -> int:
        """Queues the rows of `batch` and replaces finished rows.

        Args:
            batch: what `fresh_rows` takes, of any shape.
            slots: rows to hold from now on; None = as before, at first as many as `batch` has.

        Returns:
            How many rows were replaced.

        Raises:
            ValueError: `fresh_rows` does not take the batch.
        """
        incoming = fresh_rows(self.config, batch, carries_state=False)
        self.queue += _unpadded(incoming)
        is_cold = self.rows is None
        if is_cold:
            self.rows = self._blank(slots or len(incoming), incoming.clean_ids.device)
        elif slots is not None and slots != len(self.rows):
            self._resize(slots)
        free = self.rows.is_finished.nonzero()[: len(self.queue), 0]
        if len(free):
            fresh = self._take(len(free))
            self._put(stagger(fresh) if is_cold and self.staggered else fresh, free)
        self.entered += len(free)
        self.dropped += len(self.queue[self.queue_size :])
        del self.queue[self.queue_size :]
        return len(free)

    def store(self, rows: RolloutRows) -> None:
        """Keeps the rows as the rollout left them."""
        self.rows = rows

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the rows and of the queue by name; empty before the first batch."""
        if self.rows is None:
            return {}
        tensors = {name: getattr(self.rows, name) for name in FIELDS}
        tensors[COUNTS] = torch.tensor([self.entered, self.dropped])
        if self.queue:
            ids, maskable = zip(*self.queue, strict=True)
            tensors["queue_ids"], tensors["queue_maskable"] = torch.cat(ids), torch.cat(maskable)
            tensors["queue_lengths"] = torch.tensor([len(row) for row in ids])
        return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: it is of an objective that carries a state where this one does not, or the other way round, of
                another model or tokenizer, or damaged.
        """
        if state and self.carries_state != ("relay_state" in state):
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
            ids, maskable = (state[name].cpu().split(lengths) for name in ("queue_ids", "queue_maskable"))
            self.queue = list(zip(ids, maskable, strict=True))

    def _check_state(self, state: dict[str, Tensor]) -> None:
        if not state:
            return
        ids, others = state.get("clean_ids"), [state.get(name) for name in ("maskable", "attention_mask", "masked")]
        relay_state, vocab_size = state.get("relay_state"), self.config.text_config.vocab_size
        texts = [tensor for tensor in (ids, state.get("queue_ids")) if tensor is not None and tensor.numel()]
        fits = ids is not None and all(other is not None and other.shape == ids.shape for other in others)
        fits = fits and (relay_state is None or relay_state.shape == (*ids.shape, self.config.relay_state_width))
        fits = fits and all(int(t.min()) >= 0 and int(t.max()) < vocab_size for t in texts)
        # Only what is learned counts: [MASK] may stand in a prompt, and stands behind a text.
        if not fits or bool((state["maskable"] & (ids == self.config.mask_token_id)).any()):
            raise ValueError(
                "The checkpoint's rollout buffer is damaged, or of another model or tokenizer: resume with the model "
                "that it was trained with, or delete its `rollout_buffer_*.safetensors`."
            )

    def _resize(self, slots: int) -> None:
        """The batch has another size after a resume: rows too many begin again later, missing ones are free."""
        surplus = self.rows.map(lambda tensor: tensor[slots:])
        again = _unpadded(surplus.map(lambda tensor: tensor[~surplus.is_finished]))
        self.queue[:0] = again
        self.entered -= len(again)
        kept, device = self.rows.map(lambda tensor: tensor[:slots]), self.rows.clean_ids.device
        blank = self._blank(slots - len(kept), device).fit(kept.clean_ids.shape[1])
        self.rows = kept.map(lambda *tensors: torch.cat(tensors), blank)

    def _blank(self, count: int, device: torch.device) -> RolloutRows:
        """Rows without text, which count as finished."""
        ids, flags = torch.zeros(count, 0, dtype=torch.long, device=device), torch.zeros(count, 0, device=device).bool()
        state = torch.zeros(count, 0, self.config.relay_state_width, device=device)
        has_state = torch.zeros(count, device=device).bool()
        return RolloutRows(ids, flags, flags, flags, state if self.carries_state else None, has_state)

    def _take(self, count: int) -> RolloutRows:
        """The rows that have waited longest, out of the queue."""
        taken, self.queue = self.queue[:count], self.queue[count:]
        ids, maskable = (pad_sequence(column, batch_first=True) for column in map(list, zip(*taken, strict=True)))
        lengths = torch.tensor([len(row) for row, _ in taken])
        batch = {
            "input_ids": ids,
            "labels": ids.where(maskable, -100),
            "attention_mask": torch.arange(ids.shape[1]) < lengths[:, None],
        }
        device = self.rows.clean_ids.device
        return fresh_rows(self.config, {n: t.to(device) for n, t in batch.items()}, self.carries_state)

    def _put(self, fresh: RolloutRows, slots: Tensor) -> None:
        length = max(self.rows.clean_ids.shape[1], fresh.clean_ids.shape[1])
        rows = self.rows.fit(length).map(lambda kept, new: kept.index_copy(0, slots, new), fresh.fit(length))
        # Without this the longest row ever seen would set the cost of every later step.
        self.rows = rows.fit(int(rows.attention_mask.sum(-1).max()))


def _unpadded(rows: RolloutRows) -> list[tuple[Tensor, Tensor]]:
    """Text and what is learned of it, for each row that has something to learn."""
    lengths = rows.attention_mask.sum(-1).tolist()
    ids, maskable = rows.clean_ids.cpu(), rows.maskable.cpu()
    texts = [(ids[row, :length].clone(), maskable[row, :length].clone()) for row, length in enumerate(lengths)]
    return [(text, learned) for text, learned in texts if bool(learned.any())]
