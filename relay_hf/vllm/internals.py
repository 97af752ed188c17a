"""Every name of vLLM that its documentation does not promise, imported in this one place.

`tests/vllm/test_contract.py` fails if one of them moves, or one of the methods that ours override.
"""

from vllm.config.compilation import CUDAGraphMode
from vllm.config.diffusion import DiffusionConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.diffusion_scheduler import DiffusionScheduler
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.output import SamplerOutput

__all__ = [
    "MODELS_CONFIG_MAP",
    "CUDAGraphMode",
    "DiffusionConfig",
    "DiffusionScheduler",
    "LogitsProcessor",
    "ModelState",
    "RequestSpecDecodeMetrics",
    "SamplerOutput",
    "VerifyAndUpdateConfig",
    "async_tensor_h2d",
    "build_attn_metadata",
    "init_vllm_registered_model",
    "maybe_prefix",
]
