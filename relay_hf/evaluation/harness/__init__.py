"""lm-evaluation-harness: importing this room makes the model `relay` known to it. Needs `relay-hf[eval]`."""

from .model import GENERATION_OPTIONS, GenerationForwards, RelayLM

__all__ = ["GENERATION_OPTIONS", "GenerationForwards", "RelayLM"]
