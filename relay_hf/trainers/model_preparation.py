"""Makes a model ready for training."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def keep_caches_under_checkpointing(model: nn.Module) -> None:
    """Lets the layers of `model` keep the caches of `clean_text.py` when gradient checkpointing replays them.

    transformers drops every cache there, unless a layer is known to only read it. The two caches of a rollout can be
    replayed: one is read-only, the other is written once. There is no public switch; `test_denoiser.py` fails if this
    one moves.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._can_checkpoint_with_cache = True
