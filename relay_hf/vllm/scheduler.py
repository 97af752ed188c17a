"""The scheduler: vLLM's own for models that denoise, with the borders of blocks.

vLLM counts the tokens of a text whose keys and values are final ("computed"), and gives a step some of the others. Here
the border between the two only ever lies between two blocks: a prompt's unfinished block is computed anew in every
step, with the masks behind it, as far as the block goes.
"""

import copy
from typing import Any

from .config import reads_before_block
from .internals import DiffusionScheduler, RequestSpecDecodeMetrics

# Beside a request's options when it is resumed: the denoise forwards that it had before the block in work.
EARLIER_FORWARDS = "relay_earlier_forwards"


class RelayScheduler(DiffusionScheduler):
    """Schedules whole blocks.

    Its counts of "speculative" steps are forwards: `metrics.speculative_decoding` in a response says how many a request
    took, denoise and commit, and its `acceptance_histogram[0]` how many of them ended no block.

    Args:
        args, kwargs: of vLLM's scheduler.

    Attributes:
        size: S, positions of a block.
        shares_pages: whether a page of the cache holds whole blocks, so that other requests may read it.
        recomputed: positions before the border that are computed once more, for what the last of them leaves.
        forwards: of each request, [denoise forwards before the block in work, forwards of that block].
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.size: int = self.num_spec_tokens
        # vLLM may have lowered it to what memory allows.
        self.max_model_len: int = self.vllm_config.model_config.max_model_len // self.size * self.size
        config = self.vllm_config.model_config.hf_config
        self.shares_pages = self.block_size % self.size == 0
        self.recomputed = self.size if reads_before_block(config) else 0
        self.forwards: dict[str, list[int]] = {}
        # vLLM's own hook for rounding a chunk of a prompt asks `_mamba_block_aligned_split`.
        self.need_mamba_block_aligned_split = True

    def add_request(self, request: Any) -> None:
        super().add_request(request)
        if request.spec_decode_metrics is None:
            request.spec_decode_metrics = RequestSpecDecodeMetrics.new(self.size)
        self.forwards.setdefault(request.request_id, [0, 0])

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Plans a step; a request that comes back learns how many forwards it has had."""
        output = super().schedule(*args, **kwargs)
        for new in output.scheduled_new_reqs:
            if earlier := self.forwards[new.req_id][0]:
                new.sampling_params = copy.copy(new.sampling_params)  # the request keeps its own
                new.sampling_params.extra_args = {**(new.sampling_params.extra_args or {}), EARLIER_FORWARDS: earlier}
        return output

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """Cuts each request's block behind the tokens that are known."""
        for i, req_id in enumerate(draft_token_ids.req_ids):
            if (request := self.requests.get(req_id)) is not None:
                masks = self.size - request.num_tokens % self.size
                draft_token_ids.draft_token_ids[i] = draft_token_ids.draft_token_ids[i][:masks]
        super().update_draft_token_ids(draft_token_ids)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Moves each request's border back to the last whole block, and counts forwards."""
        before = {req_id: self.requests[req_id].num_tokens for req_id in scheduler_output.num_scheduled_tokens
                  if req_id in self.requests}  # fmt: skip
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        drafted = scheduler_output.scheduled_spec_decode_tokens
        for req_id, num_tokens in before.items():
            request = self.requests.get(req_id)
            if request is None:
                continue
            border = request.num_tokens // self.size * self.size
            request.num_computed_tokens = min(request.num_computed_tokens, border)
            if req_id in drafted:
                self._count(req_id, ends_block=request.num_tokens > num_tokens)
        return outputs

    def _count(self, req_id: str, ends_block: bool) -> None:
        counts = self.forwards[req_id]
        counts[1] += 1
        if ends_block:
            counts[0] += counts[1] - 1  # the last forward of a block commits it
            counts[1] = 0

    def _free_blocks(self, request: Any) -> None:
        super()._free_blocks(request)
        self.forwards.pop(request.request_id, None)

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.forwards[request.request_id][1] = 0  # the block begins anew

    def _mamba_block_aligned_split(self, request: Any, num_new_tokens: int, *cached: int) -> int:
        """Rounds a chunk down to whole blocks, unless it is all that there is.

        Args:
            request: the request.
            num_new_tokens: positions that the step has room for.
            cached: positions that were found in the cache, for a request that starts.
        """
        begin = request.num_computed_tokens + sum(cached)
        end = begin + num_new_tokens
        if end < request.num_tokens_with_spec:
            end = end // self.size * self.size
        return max(end - begin, 0)

    def _get_local_prefix_cache_hit(self, request: Any) -> tuple[Any, int, int, bool]:
        """Pages that other requests have computed, as far as they are final for this one."""
        pages, length, *rest = super()._get_local_prefix_cache_hit(request)
        # The block that the prompt ends in is computed with the request; a page with a part of it is not final.
        border = max(request.num_tokens // self.size * self.size - self.recomputed, 0)
        usable = min(length, border // self.block_size * self.block_size) if self.shares_pages else 0
        if usable < length:
            pages, length = self.kv_cache_manager.truncate_computed_blocks(pages, usable), usable
        return (pages, length, *rest)
