from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2ForCausalLM, TrainerCallback
from trl import SFTConfig

from relay_hf import RelayConfig, RelayForMaskedDiffusion
from relay_hf.trainers import RelayTrainer
from relay_hf.trainers.objectives import reveals

from ..conftest import text_config
from .conftest import OBJECTIVES, build_model, build_model_for, build_rows


def logged(trainer: RelayTrainer, name: str) -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("overrides", [{}, {"block_size": None, "token_shift": False, "relay_scope": "all"}])
def test_train_each_objective_loss_falls(
    make_trainer: Callable[..., RelayTrainer], objective: str, overrides: dict
) -> None:
    memorised = Dataset.from_dict(
        {n: t.repeat(64, 1).tolist() for n, t in build_rows(1).items() if n != "attention_mask"}
    )
    model = build_model_for(objective, **overrides)
    trainer = make_trainer(model, memorised, objective=objective, max_steps=30, learning_rate=1e-2)
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("block_size", [4, None])
@pytest.mark.parametrize("channel", ["residual_context", "soft_mask"])
def test_train_distribution_channel_loss_falls_and_resumes(
    make_trainer: Callable[..., RelayTrainer], channel: str, block_size: int | None
) -> None:
    memorised = Dataset.from_dict(
        {n: t.repeat(64, 1).tolist() for n, t in build_rows(1).items() if n != "attention_mask"}
    )
    model = build_model(relay_channel=channel, block_size=block_size, token_shift=block_size is not None)
    options = {"objective": "relay_sg", "max_steps": 20, "learning_rate": 1e-2, "save_strategy": "steps"}
    trainer = make_trainer(model, memorised, save_steps=10, **options)
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-10")).global_step == 20


@pytest.mark.parametrize("channel", ["residual_context", "soft_mask"])
def test_trainer_relay_objective_with_channel_that_is_not_differentiated_raises(
    make_trainer: Callable[..., RelayTrainer], channel: str
) -> None:
    with pytest.raises(
        ValueError,
        match=r"`objective='relay'` needs a channel that can be differentiated.*\[.*'layer_norm'.*\].*'relay_sg'",
    ):
        make_trainer(build_model(relay_channel=channel), objective="relay")


def test_train_objective_that_ignores_the_channel_leaves_it_alone(make_trainer: Callable[..., RelayTrainer]) -> None:
    model = build_model()
    before = weights(model.relay)
    make_trainer(model, objective="rollout").train()
    assert all(torch.equal(before[name], p) for name, p in model.relay.named_parameters())


def test_metrics_show_whether_the_channel_is_used(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer(rollout_steps=3, max_steps=2)
    trainer.train()
    entry = trainer.state.log_history[0]
    for name in ("loss_step_1", "loss_step_3", "reveals_step_2", "masked_fraction", "buffer_refills"):
        assert name in entry
    assert entry["relay_weight_norm"] > 0
    assert entry["relay_grad_norm"] > 0
    assert 0 < entry["relay_grad_ratio"] < float("inf")
    assert logged(trainer, "buffer_refills")[0] == 4
    assert float(entry["loss"]) == pytest.approx(sum(entry[f"loss_step_{k}"] for k in (1, 2, 3)), rel=1e-4)


def test_relay_learning_rate_moves_only_the_channel(make_trainer: Callable[..., RelayTrainer]) -> None:
    model = build_model()
    before = weights(model)
    trainer = make_trainer(model, learning_rate=0.0, relay_learning_rate=1e-2)
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"relay.norm.weight", "relay.norm.bias"}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(before)


def test_accumulation_equals_the_mean_of_its_micro_batches(make_trainer: Callable[..., RelayTrainer]) -> None:
    """One step of 4 x 1 equals one of 1 x 4 where every row has as many masks: a mean of equal means."""
    results = []
    for size, accumulation in ((4, 1), (1, 4)):
        trainer = make_trainer(
            objective="rollout",
            rollout_steps=1,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.1,
            optim="sgd",
            staggered_start=False,
        )
        if size == 1:
            # One slot lives through four micro-batches here: start each of them afresh.
            trainer.buffer.store = lambda rows, buffer=trainer.buffer: setattr(buffer, "rows", None)
        trainer.train()
        results.append(weights(trainer.model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-6)


def test_evaluation_twice_gives_the_same_loss(make_trainer: Callable[..., RelayTrainer], dataset: Dataset) -> None:
    for objective in OBJECTIVES:
        options = {"objective": objective, "trainer_options": {"eval_dataset": dataset}}
        trainer = make_trainer(build_model_for(objective), threshold_jitter=0.3, **options)
        torch.manual_seed(1)
        first = trainer.evaluate()["eval_loss"]
        torch.manual_seed(2)
        assert trainer.evaluate()["eval_loss"] == first
        assert trainer.buffer.rows is None, "evaluation must not touch the training buffer"


def test_threshold_jitter_stays_in_range_and_varies(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer(threshold_jitter=2.0, rollout_steps=50)

    def thresholds(jitter: bool) -> list[float]:
        return [reveal.policy.threshold for reveal in reveals(trainer.args, trainer.relay_config, jitter)]

    drawn = thresholds(jitter=True)
    assert min(drawn) == 0.0
    assert max(drawn) == 1.0
    assert len(set(drawn)) > 5
    before = torch.get_rng_state()
    assert set(thresholds(jitter=False)) == {0.3}
    assert torch.equal(torch.get_rng_state(), before), "evaluation must draw no random numbers"


def test_weight_average_is_evaluated_and_left_in_the_model(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset
) -> None:
    trainer = make_trainer(ema_decay=0.9, trainer_options={"eval_dataset": dataset})
    trainer.train()
    averaged = trainer.evaluate()["eval_loss"]
    for name, average in trainer.weight_average.average.items():
        assert torch.equal(trainer.weight_average.parameters()[name], average)
    trainer.weight_average = None
    assert trainer.evaluate()["eval_loss"] == averaged


def test_lora_trains_adapters_and_the_whole_channel(make_trainer: Callable[..., RelayTrainer], tmp_path: Path) -> None:
    base = build_model()
    base.save_pretrained(tmp_path / "base")
    base = RelayForMaskedDiffusion.from_pretrained(tmp_path / "base")
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(base, learning_rate=1e-2, trainer_options={"peft_config": peft_config})
    trainer.train()
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trainable)
    assert {n for n in trainable if "lora" not in n} == {n for n in trainable if "relay.modules_to_save" in n}
    trainer.save_model(str(tmp_path / "adapter"))

    ids, state = build_rows(1)["input_ids"], torch.randn(1, 12, 16)
    trained = trainer.model.eval()(ids, relay_state=state).logits
    fresh = RelayForMaskedDiffusion.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(ids, relay_state=state).logits, trained)
    merged = loaded.merge_and_unload()
    assert isinstance(merged, RelayForMaskedDiffusion)
    torch.testing.assert_close(merged(ids, relay_state=state).logits, trained, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = RelayForMaskedDiffusion.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(ids, relay_state=state).logits, trained, rtol=1e-4, atol=1e-5)


def test_trainer_model_given_as_path_is_loaded(make_trainer: Callable[..., RelayTrainer], tmp_path: Path) -> None:
    build_model().save_pretrained(tmp_path / "model")
    trainer = make_trainer(str(tmp_path / "model"), max_steps=1)
    assert isinstance(trainer.model, RelayForMaskedDiffusion)
    trainer.train()


def test_trainer_prompt_completion_text_learns_the_completion_only(
    make_trainer: Callable[..., RelayTrainer],
) -> None:
    backbone = text_config(vocab_size=257, num_hidden_layers=1)
    model = RelayForMaskedDiffusion(RelayConfig.fast_dllm_v2(backbone, mask_token_id=256, block_size=4))
    rows = [{"prompt": "2 + 2 = ", "completion": "4."}, {"prompt": "one, two, ", "completion": "three"}] * 8
    # Places for all rows.
    trainer = make_trainer(model, Dataset.from_list(rows), max_steps=1, per_device_train_batch_size=16)
    trainer.train()
    learned = trainer.buffer.rows.learned.sum(-1)
    assert set(learned.tolist()) == {3, 6}, "the completion and its end-of-text token"


def test_trainer_gradient_checkpointing_gives_the_same_losses(make_trainer: Callable[..., RelayTrainer]) -> None:
    runs = []
    for enabled in (False, True):
        trainer = make_trainer(gradient_checkpointing=enabled)
        trainer.train()
        runs.append(logged(trainer, "loss"))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


@pytest.mark.parametrize("objective", ["relay", "relay_sg"])
def test_trainer_objective_without_channel_raises(make_trainer: Callable[..., RelayTrainer], objective: str) -> None:
    with pytest.raises(ValueError, match=f"`objective='{objective}'` needs a channel that"):
        make_trainer(build_model(relay_channel="none"), objective=objective)


def test_trainer_all_labels_ignored_raises(make_trainer: Callable[..., RelayTrainer]) -> None:
    rows = Dataset.from_dict({"input_ids": [[3, 4, 5]] * 4, "labels": [[-100] * 3] * 4})
    with pytest.raises(ValueError, match="All labels of the training set are -100"):
        make_trainer(data=rows)


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func"])
def test_trainer_argument_without_meaning_raises(make_trainer: Callable[..., RelayTrainer], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is not supported"):
        make_trainer(trainer_options={name: lambda *args: None})


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
def test_trained_model_can_be_copied(make_trainer: Callable[..., RelayTrainer], peft_config: LoraConfig | None) -> None:
    """TRL's patched forward would make the copy compute with the original's weights."""
    import copy

    trainer: Any = make_trainer(max_steps=1, trainer_options={"peft_config": peft_config})
    trainer.train()
    model, ids = trainer.model.eval(), build_rows(1)["input_ids"]
    if peft_config is not None:
        model = model.merge_and_unload()
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.lm_head.weight)
    assert other(ids).logits.abs().sum() == 0
    assert model(ids).logits.abs().sum() > 0


def test_trainer_leaves_the_callers_objects_as_they_were(
    make_trainer: Callable[..., RelayTrainer], tmp_path: Path
) -> None:
    peft_config = LoraConfig(r=2, target_modules=["q_proj"])
    build_model().save_pretrained(tmp_path / "model")
    options = {"attn_implementation": "eager"}
    trainer = make_trainer(
        str(tmp_path / "model"), model_init_kwargs=options, trainer_options={"peft_config": peft_config}
    )
    assert peft_config.modules_to_save is None
    assert trainer.args.model_init_kwargs == options
    assert any("relay.modules_to_save" in n for n, p in trainer.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("modules_to_save", [None, ["relay"]])
def test_trainer_peft_model_with_frozen_channel_raises(
    make_trainer: Callable[..., RelayTrainer], modules_to_save: list[str] | None, tmp_path: Path
) -> None:
    peft_config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules_to_save)
    model = get_peft_model(build_model(), peft_config)
    if modules_to_save is not None:
        make_trainer(model, max_steps=1).train()
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(build_model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="trains the relay channel, but it is frozen"):
        make_trainer(model)


def test_trainer_plain_decoder_raises(make_trainer: Callable[..., RelayTrainer]) -> None:
    with pytest.raises(
        ValueError, match="`model` is a Qwen2ForCausalLM, which has no relay channel: make a relay model of it"
    ):
        make_trainer(Qwen2ForCausalLM(build_model().config.text_config))


def test_trainer_arguments_of_another_trainer_raise(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`args` is a SFTConfig"):
        RelayTrainer(build_model(), SFTConfig(str(tmp_path), bf16=False), train_dataset=dataset)


def test_trainer_channel_rate_with_a_given_optimizer_raises(make_trainer: Callable[..., RelayTrainer]) -> None:
    model = build_model()
    given = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    with pytest.raises(ValueError, match="not applied to a given optimizer"):
        make_trainer(model, relay_learning_rate=1e-2, trainer_options={"optimizers": given})


def test_predict_raises(make_trainer: Callable[..., RelayTrainer], dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="no single set of logits"):
        make_trainer().predict(dataset)


@pytest.mark.parametrize("logging_steps", [1, 0.5])
def test_channel_norms_are_logged_whatever_the_unit_of_logging_steps(
    make_trainer: Callable[..., RelayTrainer], logging_steps: float
) -> None:
    trainer = make_trainer(logging_steps=logging_steps)
    trainer.train()
    assert len(logged(trainer, "relay_grad_norm")) == len(logged(trainer, "learning_rate"))


@pytest.mark.parametrize("overrides", [{}, {"block_size": None, "token_shift": False}])
def test_masked_evaluation_does_not_depend_on_the_order_of_rows(
    make_trainer: Callable[..., RelayTrainer], dataset: Dataset, overrides: dict
) -> None:
    trainer = make_trainer(build_model(**overrides), objective="masked", per_device_eval_batch_size=8)
    masks = [trainer.evaluate(dataset.select(rows))["eval_loss"] for rows in (range(8), [3, 1, 0, 2, 7, 6, 5, 4])]
    assert masks[0] == pytest.approx(masks[1])


def test_trainer_tokenizer_with_ids_outside_the_vocabulary_raises(
    make_trainer: Callable[..., RelayTrainer], tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=r"`pad_token_id` is .* but the model has 40 tokens"):
        make_trainer(trainer_options={"processing_class": tokenizer})


@pytest.mark.parametrize(
    ("objective", "expected"), [("rollout", True), ("masked", True), ("complementary", True), ("relay", None)]
)
def test_trainer_tells_ddp_of_an_unused_channel(
    make_trainer: Callable[..., RelayTrainer], objective: str, expected: bool | None
) -> None:
    assert make_trainer(objective=objective).args.ddp_find_unused_parameters is expected


def test_relay_weight_decay_shrinks_only_the_channel(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer(relay_weight_decay=0.5, weight_decay=0.25)
    groups = trainer.create_optimizer().param_groups
    channel = {id(parameter) for parameter in trainer.model.relay.parameters()}
    for group in groups:
        own = [id(parameter) in channel for parameter in group["params"]]
        assert all(own) or not any(own)
        assert group["lr"] == 1e-3
        assert group["weight_decay"] == 0.5 if any(own) else group["weight_decay"] in (0.0, 0.25)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_evaluation_does_not_depend_on_the_batch_size(
    make_trainer: Callable[..., RelayTrainer], objective: str
) -> None:
    rows = build_rows(7, length=14)
    data = Dataset.from_list(
        [
            {"input_ids": ids[: 6 + row].tolist(), "labels": labels[: 6 + row].tolist()}
            for row, (ids, labels) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True))
        ]
    )
    scores = [
        make_trainer(build_model_for(objective), objective=objective, per_device_eval_batch_size=size).evaluate(data)[
            "eval_loss"
        ]
        for size in (1, 3, 7)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-5)


@pytest.mark.parametrize(("window", "micro_batches"), [(None, 1), (1, 1), (None, 2)])
def test_train_non_finite_loss_stops_before_the_weights_change(
    make_trainer: Callable[..., RelayTrainer], window: int | None, micro_batches: int
) -> None:
    trainer = make_trainer(gradient_window=window, gradient_accumulation_steps=micro_batches)
    before: list[dict[str, torch.Tensor]] = []

    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                before.append(weights(model))
                trainer.buffer.rows.relay_state.fill_(float("nan"))

    trainer.add_callback(Spoil())
    with pytest.raises(
        FloatingPointError, match=r"loss of training step 3 is nan \(denoising steps: \[nan, .*lower `learn"
    ):
        trainer.train()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in weights(trainer.model).items())


def test_train_non_finite_gradient_stops_before_the_weights_change(make_trainer: Callable[..., RelayTrainer]) -> None:
    trainer = make_trainer()
    before = weights(trainer.model)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="gradient of training step 1"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer.model).items())


@pytest.mark.parametrize("objective", ["relay", "complementary"])
def test_train_in_windows_with_accumulation_is_the_sum_of_its_windows(
    make_trainer: Callable[..., RelayTrainer], objective: str
) -> None:
    """For `relay`, one window of both steps differs from two windows only by the gradient of the state."""
    results = {}
    for window in (None, 1):
        trainer = make_trainer(
            build_model(channel_scale=0.0),  # a closed channel passes no gradient on
            objective=objective,
            gradient_window=window,
            gradient_accumulation_steps=2,
            optim="sgd",
            max_steps=1,
            learning_rate=0.1,
        )
        trainer.train()
        results[window] = (weights(trainer.model), logged(trainer, "loss") + logged(trainer, "grad_norm"))
    for name, expected in results[None][0].items():
        torch.testing.assert_close(results[1][0][name], expected, rtol=1e-4, atol=1e-6)
    assert results[1][1] == pytest.approx(results[None][1], rel=1e-4)
