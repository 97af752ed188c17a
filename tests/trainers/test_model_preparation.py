from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig, SFTTrainer

from relay_hf import RelayForMaskedDiffusion
from relay_hf.trainers.model_preparation import keeps_forward

from .conftest import build_dataset, build_model, build_tokenizer


def own_forward(*args: Any, **kwargs: Any) -> None:
    """One that was put onto the model before, as by a hook."""


@pytest.mark.parametrize("own", [None, own_forward])
def test_forward_that_trl_installs_is_gone_afterwards(tmp_path: Path, own: Callable[..., None] | None) -> None:
    model = build_model()
    if own is not None:
        model.forward = own
    before, held = dict(vars(model)), set(vars(model))
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False)
    with keeps_forward(model):
        SFTTrainer(model, args, train_dataset=build_dataset(), processing_class=build_tokenizer())
        assert vars(model)["forward"] is not own, "TRL no longer puts its `forward` onto the model: see `keeps_forward`"
    assert set(vars(model)) - held <= {"model_tags"}, "TRL leaves more on the model than its `forward` and tags"
    assert vars(model).get("forward") is before.get("forward")
    assert type(model) is RelayForMaskedDiffusion
