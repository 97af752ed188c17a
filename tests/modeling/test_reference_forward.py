"""The published reference, number by number: one forward pass."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from relay_hf import RelayForMaskedDiffusion


@pytest.fixture(scope="module")
def model(reference: Path) -> RelayForMaskedDiffusion:
    return RelayForMaskedDiffusion.from_pretrained(reference / "checkpoint")


def position_aligned(raw: Tensor) -> Tensor:
    return torch.cat([raw[:, :1], raw[:, :-1]], dim=1)


def state_of(name: str, vectors: dict[str, Tensor]) -> Tensor | None:
    random = vectors["forward.relay_state"]
    return {"none": None, "zeros": torch.zeros_like(random), "random": random}[name]


@pytest.mark.parametrize("output", ["logits", "state"])
def test_forward_of_the_reference_equal(
    model: RelayForMaskedDiffusion, reference_vectors: dict[str, Tensor], forward_case: str, output: str
) -> None:
    vectors = reference_vectors
    with torch.no_grad():
        result = model(vectors["forward.input_ids"], relay_state=state_of(forward_case, vectors))
    ours = result.logits if output == "logits" else result.relay_state
    # Another order of summation is allowed, which processors choose; one float32 digit of values around 10 is 1e-6.
    torch.testing.assert_close(ours, position_aligned(vectors[f"forward.{forward_case}.{output}"]), atol=3e-5, rtol=0)


def test_forward_of_the_reference_states_matter(reference_index: dict, reference_vectors: dict[str, Tensor]) -> None:
    """Else the test above could pass with a channel that is never used."""
    logits = [reference_vectors[f"forward.{name}.logits"] for name in reference_index["forward"]]
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(logits) for b in logits[:i])


def test_forward_of_the_reference_eager_attention_equal(
    reference: Path, reference_vectors: dict[str, Tensor], forward_case: str
) -> None:
    eager = RelayForMaskedDiffusion.from_pretrained(reference / "checkpoint", attn_implementation="eager")
    with torch.no_grad():
        result = eager(reference_vectors["forward.input_ids"], relay_state=state_of(forward_case, reference_vectors))
    expected = position_aligned(reference_vectors[f"forward.{forward_case}.logits"])
    # Another attention algorithm than the reference's rounds differently: ten times the tolerance of the same one.
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=0)
