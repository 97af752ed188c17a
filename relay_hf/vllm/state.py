"""The state of vLLM's model runner for relay models: inputs and attention of a step, from the rows of its requests.

Legend: T positions of a step, d of its requests with a block, S positions of a block, D hidden size.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..modeling.channel_relay import in_scope
from .attention import cut_into_blocks
from .checks import reader_of
from .internals import CUDAGraphMode, ModelState, async_tensor_h2d, build_attn_metadata
from .plan import Batch, StepPlan, make_plan
from .rows import Rows
from .sampler import RelaySampler


class RelayModelState(ModelState):
    """What vLLM's model runner asks of a model that keeps something between steps.

    Args:
        vllm_config: configuration of vLLM.
        model: the `RelayForVllm`.
        encoder_cache: None, for models of text.
        device: of the tensors.

    Attributes:
        rows: what each request is at.
        embeds: (T, D) embeddings of a step, at one address, which a captured graph reads.
    """

    num_new_sampled_tokens_per_step = 0

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.config = config = model.config
        source, revision = self.model_config.hf_config_path or self.model_config.model, self.model_config.revision
        reader = reader_of(source, revision, device)
        self.rows = Rows(self.max_num_reqs, config, reader, self.dtype, device)
        self.carries = config.relay_channel != "none"
        width = config.text_config.hidden_size
        self.embeds = torch.zeros(self.max_num_tokens, width, dtype=self.dtype, device=device)

    def get_supported_generation_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def custom_sampler(self, sampler: Any) -> tuple[RelaySampler, None]:
        return RelaySampler(self.model, self.rows, sampler.req_states), None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        self.rows.add(req_index, new_req_data)

    def remove_request(self, req_id: str) -> None:
        self.rows.remove(req_id)

    def apply_staged_writes(self) -> None:
        self.rows.flush()

    # -- inputs -----------------------------------------------------------------------------------------------------

    def prepare_inputs_embeds(self, scheduled_encoder_inputs: Any, input_batch: Any, req_states: Any) -> None:
        """Models of text only; `prepare_inputs` makes the embeddings."""

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        self.model.step = None
        return {"inputs_embeds": self.embeds[:num_tokens]}

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """The step's embeddings, with the state of blocks that denoise; and what it has to score.

        vLLM gets the outputs that it is to hand on: those that are scored, then those of the blocks that leave a state.
        """
        count = input_batch.num_tokens
        inputs = {"inputs_embeds": self.embeds[: input_batch.num_tokens_after_padding]}
        ids = input_batch.input_ids[:count].long()
        self.embeds[:count] = self.model.embed_input_ids(ids)
        if not self.rows.options:  # vLLM measures memory, or warms up
            self.model.step = None
            return inputs
        batch = Batch.of(input_batch, self.config.block_size, self.device)
        plan = self.model.step = make_plan(self.rows, batch)
        wanted = [plan.indices(self.config.token_shift)] if plan.scored else []
        if self.carries and batch.drafts:
            of_blocks = self._of_blocks(batch)
            self._inject(plan, of_blocks)
            wanted.append(of_blocks.flatten())
        input_batch.logits_indices = torch.cat(wanted) if wanted else batch.slots[:0]
        return inputs

    def _of_blocks(self, batch: Batch) -> Tensor:
        """(d, S) numbers of the blocks' tokens among those of the step."""
        place = torch.arange(self.config.block_size, device=self.device)
        return batch.starts[: batch.drafts, None] + place

    def _inject(self, plan: StepPlan, of_blocks: Tensor) -> None:
        """Puts the state into the embeddings of blocks that denoise; a committed block never sees it."""
        drafts, channel, config = plan.batch.drafts, self.model.relay, self.config
        has_state = plan.moving.has_state[:drafts] > 0
        starts_from_zeros = channel.initial_state(1, 1, self.device) is not None
        state = self.rows.state[plan.batch.slots[:drafts]].where(has_state[:, None, None], 0)
        takes_part = plan.denoises & (plan.fixed.uses_relay[:drafts] > 0)
        takes_part = takes_part if starts_from_zeros else takes_part & has_state
        receives = in_scope(config, plan.canvas == config.mask_token_id) & takes_part[:, None]
        self.embeds[of_blocks] = channel(self.embeds[of_blocks], receives, state)

    # -- attention --------------------------------------------------------------------------------------------------

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """Block-causal attention, see `attention`."""
        shared = {
            "attn_groups": attn_groups,
            "slot_mappings": slot_mappings,
            "kv_cache_config": kv_cache_config,
            "causal": False,
        }
        count, size = input_batch.num_reqs, self.config.block_size
        lengths = np.diff(input_batch.query_start_loc_np[: count + 1]).astype(np.int64)
        if lengths.max() <= size:
            # One block each: vLLM's own tensors say it, at the addresses that a captured graph reads.
            is_full = cudagraph_mode == CUDAGraphMode.FULL
            return build_attn_metadata(
                num_reqs=input_batch.num_reqs_after_padding if is_full else count,
                num_tokens=input_batch.num_tokens_after_padding if is_full else input_batch.num_tokens,
                query_start_loc_gpu=input_batch.query_start_loc,
                query_start_loc_cpu=torch.from_numpy(input_batch.query_start_loc_np),
                max_query_len=int(lengths.max()),
                seq_lens=input_batch.seq_lens,
                max_seq_len=self.max_model_len,
                block_tables=block_tables,
                seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound,
                **shared,
            )
        pieces = cut_into_blocks(lengths, input_batch.seq_lens_cpu_upper_bound[:count].numpy().astype(np.int64), size)
        starts = async_tensor_h2d(pieces.starts, device=self.device)
        rows = async_tensor_h2d(pieces.rows, device=self.device)
        return build_attn_metadata(
            num_reqs=len(pieces.rows),
            num_tokens=input_batch.num_tokens,
            query_start_loc_gpu=starts,
            query_start_loc_cpu=torch.from_numpy(pieces.starts),
            max_query_len=int(np.diff(pieces.starts).max()),
            seq_lens=async_tensor_h2d(pieces.ends, device=self.device),
            max_seq_len=int(pieces.ends.max()),
            block_tables=[table[rows] for table in block_tables],
            seq_lens_cpu_upper_bound=torch.from_numpy(pieces.ends),
            **shared,
        )
