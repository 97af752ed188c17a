"""Lets vLLM's second model runner, the one for models that denoise, run on a CPU: only for tests.

Its small kernels are written in Triton, which has no backend for CPUs on PyPI. Triton's interpreter runs them; vLLM
asks whether a backend exists, so one is named that is never used. To be imported before vLLM.
"""

import os

# Triton reads it when it is imported: its own functions are made then.
os.environ["TRITON_INTERPRET"] = "1"

import triton.backends

os.environ.update(
    # A compiled function would ask the backend for more than its name.
    TORCHDYNAMO_DISABLE="1",
    VLLM_USE_V2_MODEL_RUNNER="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
)
# Binding threads to cores would put all test processes on the same one.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# In this process, so that a test can look inside; servers have processes of their own.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


class Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class Backend:
    driver, compiler = Driver, None


triton.backends.backends["cpu"] = Backend
