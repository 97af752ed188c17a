"""Which weights were evaluated: the name of a checkpoint does not say."""

import hashlib
import json

import torch

from ..modeling import RelayForMaskedDiffusion


def hash_weights(model: RelayForMaskedDiffusion) -> str:
    """Differs if a weight does; the name of a checkpoint may stay while it is trained on."""
    hashes = {}
    for name, weights in model.state_dict().items():
        # The first is an exclusive or of the elements: an even number of equal ones leaves nothing of it.
        total = weights.contiguous().flatten().view(torch.uint8).sum(dtype=torch.int64)
        hashes[name] = [torch.hash_tensor(weights).item(), total.item()]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
