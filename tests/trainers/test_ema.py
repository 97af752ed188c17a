import torch
from torch import nn

from relay_hf.trainers.ema import WeightAverage


def linear(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def test_update_follows_the_ramped_decay() -> None:
    layer = linear(0.0)
    average, expected = WeightAverage(layer, decay=0.15), 0.0
    for step, decay in enumerate([0.1, 0.15, 0.15]):
        nn.init.constant_(layer.weight, float(step + 1))
        average.update()
        expected = decay * expected + (1 - decay) * (step + 1)
        assert abs(float(average.average["weight"]) - expected) < 1e-6


def test_applied_swaps_in_the_average_and_restores() -> None:
    layer = linear(0.0)
    average = WeightAverage(layer, decay=0.5)
    nn.init.constant_(layer.weight, 1.0)
    average.update()
    with average.applied():
        inside = layer.weight.item()
    assert 0 < inside < 1
    assert layer.weight.item() == 1.0


def test_average_frozen_parameters_are_not_followed() -> None:
    layer = linear(0.0).requires_grad_(False)
    assert WeightAverage(layer, decay=0.5).average == {}


def test_state_dict_restored_continues_equally() -> None:
    layer = linear(1.0)
    first, second = WeightAverage(layer, decay=0.9), WeightAverage(linear(5.0), decay=0.9)
    first.update()
    second.parameters = first.parameters
    second.load_state_dict(first.state_dict())
    nn.init.constant_(layer.weight, 3.0)
    first.update()
    second.update()
    assert torch.equal(first.average["weight"], second.average["weight"])


def test_average_bf16_model_is_kept_in_fp32() -> None:
    layer = linear(1.0).bfloat16()
    average = WeightAverage(layer, decay=0.9)
    average.update()
    assert average.average["weight"].dtype == torch.float32
    average.copy_to_model()
    assert layer.weight.dtype == torch.bfloat16
