"""The ends of rows in the block decoder: stop tokens, stopping criteria that read text, and time limits.

Legend: n rows of a batch that are still decoded, S columns of a block.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import GenerationConfig, MaxTimeCriteria
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from .generation_given_relay import GivenBatch
from .generation_grid_relay import DecodingGrid


class Stopping:
    """Moves the ends of rows to the left.

    Args:
        token_ids: (n,) tokens that end a row, or None.
        padding: token that is written behind a row's end.
        criteria: stopping criteria of transformers, asked when a block is complete.
        mask_token_id: id of [MASK], which the criteria see where a row has fewer tokens than others.
    """

    def __init__(
        self, token_ids: Tensor | None, padding: int, criteria: Iterable[Callable[..., Tensor]], mask_token_id: int
    ) -> None:
        # The grid knows the length, and the decoder looks for stop tokens itself.
        criteria = [c for c in criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]
        self.token_ids = token_ids
        self.padding = padding
        self.clocks = [criterion for criterion in criteria if isinstance(criterion, MaxTimeCriteria)]
        self.readers = [criterion for criterion in criteria if not isinstance(criterion, MaxTimeCriteria)]
        self.mask_token_id = mask_token_id

    @classmethod
    def of(
        cls, generation_config: GenerationConfig, criteria: Iterable[Callable[..., Tensor]], mask_token_id: int
    ) -> "Stopping":
        """The stopping that the options of one `generate` ask for, with the criteria that transformers made of them."""
        # The numbers that transformers has put on the device are here as they were given.
        stops = generation_config.eos_token_id
        stops = [] if stops is None else torch.as_tensor(stops).flatten().tolist()
        padding = padding_token(generation_config.pad_token_id, stops, mask_token_id)
        return cls(generation_config._eos_token_tensor, padding, criteria, mask_token_id)

    def apply(self, grid: DecodingGrid, batch: GivenBatch, rows: slice, columns: slice) -> None:
        """Applies the criteria to a complete block: text criteria are asked about every new prefix, and a time limit
        ends all rows behind this block.

        Args:
            grid: the rows that are decoded.
            batch: those of them that this stopping is for, as they were given.
            rows: where in the grid they are.
            columns: the block.
        """
        if self.readers:
            self._apply_readers(grid, batch, rows, columns)
        # Clocks answer where the tokens are, so that these ones, which they do not read, are on the host.
        if any(bool(clock(torch.zeros(1, 1), None).any()) for clock in self.clocks):
            ends = [min(end, columns.stop) for end in grid.ends[rows]]
            grid.move_ends(grid.end[rows].clamp(max=columns.stop), ends, rows)

    def _apply_readers(self, grid: DecodingGrid, batch: GivenBatch, rows: slice, columns: slice) -> None:
        """Asks about every prefix, because a block brings many tokens at once.

        Criteria see what token-by-token decoding would show them: the batch as it was given, with as many new tokens
        behind every prompt. Rows that have ended are padded; rows with fewer tokens show [MASK]s, and their verdict is
        not used.
        """
        prompt_end, end = grid.prompt_end[rows], grid.end[rows]  # (n,)
        prompt_ends, ends = grid.prompt_ends[rows], grid.ends[rows]
        first = (columns.start - prompt_end).clamp(min=0)  # (n,) new tokens known before this block
        known = end.clamp(max=columns.stop) - prompt_end  # (n,) and with it
        # The same on the host: from the fewest new tokens before the block to the most with it.
        fewest = min(max(columns.start - n, 0) for n in prompt_ends)
        most = max(min(end, columns.stop) - n for end, n in zip(ends, prompt_ends, strict=True))
        grid.save(batch, rows, columns.stop)
        behind = torch.full_like(batch.end, self.padding)
        behind[batch.rows] = behind[batch.rows].where(end <= columns.stop, self.mask_token_id)
        prompts = batch.prompts.ids
        texts, width = batch.as_given(batch.tokens, prompts, behind[:, None], most), prompts.shape[1]
        for count in range(fewest + 1, most + 1):
            verdicts = [criterion(texts[:, : width + count], None) for criterion in self.readers]
            stops = torch.stack([torch.as_tensor(v, device=texts.device).expand(len(texts)) for v in verdicts]).any(0)
            stopped = (first < count) & (count <= known) & stops[batch.rows]
            known = known.where(~stopped, count)
            end = end.where(~stopped, prompt_end + count)
        grid.move_ends(end, end.tolist(), rows)


def padding_token(pad_token_id: int | None, stop_token_ids: list[int], mask_token_id: int) -> int:
    """The padding token; if there is none, or it is [MASK], the first stop token; if there is none, 0 or 1.

    Args:
        pad_token_id: the one that was given, or None.
        stop_token_ids: tokens that end a row.
        mask_token_id: id of [MASK], never the padding.
    """
    if pad_token_id is not None and int(pad_token_id) != mask_token_id:
        return int(pad_token_id)
    if stop_token_ids:
        return stop_token_ids[0]
    return 1 if mask_token_id == 0 else 0
