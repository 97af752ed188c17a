"""The published code, number by number: four calls of three objectives on one persistent buffer."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from relay_hf import RelayForMaskedDiffusion
from relay_hf.modeling import make_policy
from relay_hf.trainers.rollouts.batches import NO_NUMBER, number_rows
from relay_hf.trainers.rollouts.buffer import RolloutBuffer

from ..conftest import run_rollout

PUBLISHED = Path(os.environ.get("RELAY_HF_REFERENCE", Path(__file__).parents[2] / "reference"))
CASES = json.loads((PUBLISHED / "vectors.json").read_text())["rollout"]
MODES = list(dict.fromkeys(case["mode"] for case in CASES))
# Their names in the published code -> ours.
RENAMED = {"relay_layer_norm.": "relay.norm.", "layers.": "model.layers.", "norm.": "model.norm."}


@pytest.fixture(scope="module")
def vectors() -> dict[str, torch.Tensor]:
    return load_file(PUBLISHED / "vectors.safetensors")


def shift(raw: torch.Tensor) -> torch.Tensor:
    return torch.cat([raw[:, :1], raw[:, :-1]], dim=1)


def our_name(name: str) -> str:
    return next(ours + name.removeprefix(theirs) for theirs, ours in RENAMED.items() if name.startswith(theirs))


@pytest.mark.parametrize("mode", MODES)
def test_rollout_of_the_published_code_equal_in_every_call(mode: str, vectors: dict[str, torch.Tensor]) -> None:
    # The published code trains from a zero state, whatever it decodes from.
    model = RelayForMaskedDiffusion.from_pretrained(PUBLISHED / "checkpoint", relay_initial_state="zeros").train()
    mask = model.config.mask_token_id
    buffer = RolloutBuffer(model.config, keeps_state=mode != "rollout", drops_rows=True)
    for case in (case for case in CASES if case["mode"] == mode):
        given = {
            name.removeprefix(f"{case['key']}."): t for name, t in vectors.items() if name.startswith(f"{case['key']}.")
        }
        model.zero_grad()
        rows = number_rows(
            {"input_ids": given["input_ids"], "labels": given["labels"]},
            model.config,
            [NO_NUMBER] * len(given["labels"]),
        )
        assert buffer.refill(iter([rows]), slots=len(rows)) == case["refilled"]
        assert torch.equal(buffer.rows.noisy_ids(mask), given["x1"])

        policy = make_policy("confidence_threshold", case["threshold"])
        loss, result = run_rollout(model, buffer.rows, [policy, policy], mode)
        loss.backward()
        buffer.store(result.rows)

        steps = [*result.step_masked, result.rows.masked]
        assert torch.equal(steps[0] & ~steps[1], given["u1"])
        assert torch.equal(steps[1] & ~steps[2], given["u2"])
        assert torch.equal(result.rows.noisy_ids(mask), given["xn"])
        assert [float(loss) for loss in result.step_losses] == pytest.approx([case["L1"], case["L2"]], rel=1e-5)
        assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
        if mode != "rollout":
            torch.testing.assert_close(result.rows.relay_state, shift(given["h2"]), rtol=0, atol=1e-5)

        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert float(torch.nn.utils.get_total_norm(gradients.values())) == pytest.approx(case["grad_norm"], rel=1e-5)
        for name, expected in ((n.removeprefix("grad."), t) for n, t in given.items() if n.startswith("grad.")):
            error = (gradients[our_name(name)] - expected).norm() / expected.norm()
            assert float(error) <= 1e-4, name
