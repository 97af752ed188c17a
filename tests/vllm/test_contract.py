"""What the plug-in takes for granted of vLLM, which promises none of it: fails where a version differs."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

# Before what imports it.
vllm = pytest.importorskip("vllm", reason="vLLM is not installed: `make test-vllm` makes an environment that has it.")

from vllm.config.model import ModelConfig
from vllm.config.vllm import VllmConfig
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.diffusion_scheduler import DiffusionScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner, sort_batch_req_ids
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState

from relay_hf.vllm import internals, register
from relay_hf.vllm.config import ARCHITECTURE, RelayDefaults, check_engine
from relay_hf.vllm.scheduler import RelayScheduler
from relay_hf.vllm.state import RelayModelState
from relay_hf.vllm.versions import check_version

# A method that ours override -> where vLLM itself calls it.
OVERRIDDEN = {
    "_free_blocks": Scheduler,
    "_get_local_prefix_cache_hit": Scheduler.schedule,
    "_mamba_block_aligned_split": Scheduler.schedule,
    "_preempt_request": Scheduler.schedule,
    "add_request": Scheduler,
    "schedule": Scheduler,
    "update_draft_token_ids": DiffusionScheduler,
    "update_from_output": Scheduler,
}


def test_installed_version_is_known_and_registers_twice() -> None:
    check_version()
    register()
    register()
    assert internals.MODELS_CONFIG_MAP[ARCHITECTURE] is RelayDefaults
    assert ARCHITECTURE in vllm.ModelRegistry.get_supported_archs()


def test_names_that_are_imported_are_there() -> None:
    assert all(hasattr(internals, name) for name in internals.__all__)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_scheduler_method_is_used_by_vllm(name: str) -> None:
    assert name in vars(RelayScheduler)
    assert hasattr(DiffusionScheduler, name)
    assert name in inspect.getsource(OVERRIDDEN[name])


def test_private_methods_that_are_overridden_are_those_listed() -> None:
    own = {name for name, member in vars(RelayScheduler).items() if callable(member)} & set(dir(DiffusionScheduler))
    assert own - {"__init__"} == OVERRIDDEN.keys()


@pytest.mark.parametrize(
    ("owner", "text"),
    [
        (Scheduler.schedule, "if self.need_mamba_block_aligned_split:"),
        (Scheduler.__init__, "self.num_sampled_tokens_per_step"),
        (Scheduler.update_from_output, "request.num_computed_tokens -= num_rejected"),
        (Scheduler.update_from_output, "request.spec_decode_metrics.observe("),
        (KVCacheManager, "def truncate_computed_blocks(self, blocks: KVCacheBlocks, num_computed_tokens: int"),
        (GPUModelRunner.sample, "hidden_states[input_batch.logits_indices]"),
        (GPUModelRunner.sample, "logits = self.model.compute_logits(sample_hidden_states)"),
        (GPUModelRunner.sample, "self.sampler(logits, input_batch)"),
        (GPUModelRunner.execute_model, "**self.model_state.prepare_inputs(input_batch, self.req_states)"),
        (GPUModelRunner.load_model, "self.model_state.custom_sampler(self.sampler)"),
        (GPUModelRunner.add_requests, "self.model_state.apply_staged_writes()"),
        (sort_batch_req_ids, "not draft_tokens.get(r)"),
        (RequestState.__init__, "self.all_token_ids = StagedWriteTensor("),
        (RequestState.__init__, "self.draft_tokens = torch.zeros("),
        (InputProcessor, "self.validate_logits_processors_params(params)"),
        (VllmConfig.try_verify_and_update_config, "MODELS_CONFIG_MAP.get(architecture"),
        (ModelConfig, 'getattr(self.hf_config, "canvas_length", None) is not None'),
        (ModelConfig, "def head_dtype(self)"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_vllm_does_what_the_plug_in_relies_on(owner: Any, text: str) -> None:
    # Without line breaks, whose places mean nothing.
    assert "".join(text.split()) in "".join(inspect.getsource(owner).split())


def test_state_has_the_methods_that_vllm_asks_for() -> None:
    assert not getattr(RelayModelState, "__abstractmethods__", None)
    for name in ("prepare_inputs", "prepare_attn", "prepare_dummy_inputs", "prepare_inputs_embeds", "add_request"):
        ours, theirs = (inspect.signature(getattr(owner, name)) for owner in (RelayModelState, ModelState))
        assert list(ours.parameters) == list(theirs.parameters), name


def test_batch_has_the_fields_that_are_read() -> None:
    fields = set(inspect.signature(InputBatch).parameters)
    assert {"cu_num_logits_np", "idx_mapping", "idx_mapping_np", "input_ids", "logits_indices", "num_reqs",
            "num_computed_prefill_tokens_np", "num_reqs_after_padding", "num_tokens", "num_tokens_after_padding",
            "prefill_len_np", "query_start_loc", "query_start_loc_np", "seq_lens",
            "seq_lens_cpu_upper_bound"} <= fields  # fmt: skip


@pytest.mark.parametrize(
    ("speculative", "second_runner", "sentence"),
    [(object(), True, "`speculative_config` drafts"), (None, False, "Relay models need vLLM's second model runner")],
)
def test_engine_with_other_parts_is_refused(speculative: Any, second_runner: bool, sentence: str) -> None:
    fields = {"parallel_config": None, "speculative_config": speculative, "use_v2_model_runner": second_runner}
    assert hasattr(VllmConfig, "use_v2_model_runner")
    with pytest.raises(ValueError, match=sentence):
        check_engine(SimpleNamespace(**fields))
