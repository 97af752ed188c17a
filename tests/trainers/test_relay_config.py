import warnings
from pathlib import Path

import pytest
from peft import LoraConfig

from relay_hf.trainers import RelayTrainerConfig

from .conftest import build_trainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "relays"}, "`objective='relays'` is unknown"),
        ({"rollout_steps": 0}, "`rollout_steps=0` must be at least 1"),
        ({"unmasking_policy": "entropy_bound"}, "reads the entropy of distributions, which training does not compute"),
        ({"unmasking_policy": "time_schedule"}, "spreads positions over the steps of a whole text"),
        (
            {"unmasking_policy": "fixed_count", "unmasking_threshold": 2, "threshold_jitter": 0.1},
            "`threshold_jitter=0.1` would make a fraction",
        ),
        ({"unmasking_policy": "best"}, "`unmasking_policy='best'` is unknown"),
        ({"unmasking_threshold": 1.5}, "`unmasking_threshold=1.5` is not a probability"),
        ({"unmasking_policy": "confidence_budget", "unmasking_threshold": -0.1}, "is negative"),
        ({"threshold_jitter": -1.0}, "`threshold_jitter=-1.0` is a standard deviation"),
        ({"ema_decay": 1.0}, "`ema_decay=1.0` must lie strictly between"),
        (
            {
                "ema_decay": 0.9,
                "save_only_model": True,
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "save_strategy": "steps",
            },
            "`save_only_model=True` drops the moving average",
        ),
        ({"packing": True, "max_length": None}, "`max_length=None`: give a number"),
        ({"eval_packing": True, "max_length": None}, "`max_length=None`: give a number"),
        ({"packing": True, "packing_strategy": "wrapped"}, "`packing_strategy='wrapped'` cuts texts"),
        ({"train_sampling_strategy": "batch_rebalance"}, "rows are drawn one by one: choose another"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor=0.1` has no effect"),
        ({"relay_learning_rate": -1.0}, "`relay_learning_rate=-1.0` is not a number of at least 0"),
        ({"relay_learning_rate": "1e-3"}, "`relay_learning_rate='1e-3'` is not a number of at least 0"),
        ({"padding_free": True}, "`padding_free=True` flattens a batch"),
        ({"loss_type": "dft"}, "`loss_type='dft'` has no meaning here"),
    ],
)
def test_config_value_that_cannot_train_raises(options: dict, message: str, tmp_path: object) -> None:
    with pytest.raises(ValueError, match=message):
        RelayTrainerConfig(str(tmp_path), use_cpu=True, **options)


def test_config_default_runs_without_accelerator(tmp_path: object) -> None:
    config = RelayTrainerConfig(str(tmp_path))
    assert config.objective == "relay"
    assert config.recipe.keeps_state


def test_config_wide_budget_is_accepted(tmp_path: object) -> None:
    config = RelayTrainerConfig(
        str(tmp_path), use_cpu=True, unmasking_policy="confidence_budget", unmasking_threshold=3.0, objective="rollout"
    )
    assert not config.recipe.uses_channel


@pytest.mark.parametrize("enabled", [True, False])
def test_config_gradient_checkpointing_is_set_without_a_warning(tmp_path: Path, enabled: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert RelayTrainerConfig(str(tmp_path)).gradient_checkpointing
        args = RelayTrainerConfig(
            str(tmp_path), gradient_checkpointing=enabled, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    assert args.gradient_checkpointing is enabled
    for name in ("activation_checkpointing", "activation_checkpointing_kwargs"):  # of transformers 5.24
        assert getattr(args, name, getattr(args, name.replace("activation", "gradient"))) == getattr(
            args, name.replace("activation", "gradient")
        )


def test_train_adapters_prints_no_future_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        adapters = LoraConfig(r=2, target_modules=["q_proj"])
        trainer = build_trainer(tmp_path, max_steps=1, trainer_options={"peft_config": adapters})
        trainer.train()
        assert trainer.model.get_base_model().is_gradient_checkpointing
