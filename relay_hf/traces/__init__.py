"""Traces of decoding: texts that a model wrote on its own, with the denoise step in which it revealed each token.

`relay-hf traces` writes them, and the objective `"traces"` learns to write the same texts in fewer forwards.
"""

from .decoding import Trace, decode_traces, traces_of
from .tasks import TASKS, Task

__all__ = ["TASKS", "Task", "Trace", "decode_traces", "traces_of"]
