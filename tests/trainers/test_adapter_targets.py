from collections.abc import Callable
from typing import Any

import pytest
from peft import LoraConfig

from relay_hf import RelayForMaskedDiffusion
from relay_hf.trainers.adapter_targets import check_targets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "q_prj"]}, r"`target_modules` names `q_prj`, .*give some of \[.*'q_proj'"),
        ({"target_modules": "q_proj"}, "`target_modules` names `q_proj`, but no module"),
        ({"target_modules": "(q_proj"}, r"`\(q_proj` is no regular expression"),
        ({"modules_to_save": ["lm_haed"]}, "`modules_to_save` names `lm_haed`"),
    ],
)
def test_check_targets_unknown_module_raises(
    options: dict[str, Any], message: str, make_model: Callable[..., RelayForMaskedDiffusion]
) -> None:
    with pytest.raises(ValueError, match=message):
        check_targets(LoraConfig(**options), make_model())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["layers.0.self_attn.q_proj", "v_proj"]},
        {"target_modules": r".*\.q_proj"},
        {"modules_to_save": ["lm_head", "relay"]},
    ],
)
def test_check_targets_known_modules_pass(
    options: dict[str, Any], make_model: Callable[..., RelayForMaskedDiffusion]
) -> None:
    check_targets(LoraConfig(**options), make_model())
