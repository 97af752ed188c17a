"""RelayTrainer: TRL's SFTTrainer with the loss of a relay model. Wiring only; the work is in its siblings."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from ..hub_cards import save_card
from ..modeling import RelayConfig, RelayForMaskedDiffusion, make_policy
from ..modeling.reveal_relay import UnmaskingPolicy
from .buffer import RolloutBuffer, fresh_rows
from .card import training_card
from .dataset_checks import check_dataset
from .denoiser import keep_caches_under_checkpointing, make_denoiser
from .ema import WeightAverage
from .metrics import ChannelNorms, is_channel_parameter, rollout_metrics
from .noise import mask_uniformly
from .relay_config import RelayTrainerConfig
from .rollout import mean_loss, run_rollout

# PEFT looks up default targets by model type; ours are those of the usual backbones.
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(RelayConfig.model_type, ["q_proj", "v_proj"])

WEIGHT_AVERAGE_FILE = "weight_average.safetensors"


class RelayTrainer(SFTTrainer):
    r"""Trains masked diffusion models with a relay channel (arXiv 2605.22967).

    Data sets are those of `SFTTrainer`: prompt-completion, conversational, plain text or pre-tokenised; what has a
    label is masked and learned, everything else stays visible.

    Args:
        model: a `RelayForMaskedDiffusion`, a `PeftModel` around one whose `modules_to_save` has `"relay"`, or a path or
            Hub id.
        args: training arguments; `objective` and its neighbours choose what is learned.
        peft_config: train adapters instead of the whole model; the channel is always trained in full.
        kwargs: everything else that `SFTTrainer` takes (`train_dataset`, `processing_class`, `callbacks`, ...).

    Raises:
        ValueError: `model` or `args` is not of this library, the objective needs a channel that the model lacks or that
            is frozen, no position of the data set has a label, or an argument of `SFTTrainer` was given that has no
            meaning here.

    Example:

    ```python
    trainer = RelayTrainer(
        model="path/to/relay-model",
        args=RelayTrainerConfig("runs/relay", objective="relay", relay_learning_rate=1e-3),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    _tag_names = ["relay", "masked-diffusion", "trl"]
    _name = "Relay"
    _paper = {
        "title": "Learned Relay Representations for Forward-Thinking Discrete Diffusion Models",
        "id": "2605.22967",
    }
    # `compute_loss` returns the mean over a micro-batch, and the Trainer averages those over the accumulation steps.
    loss_is_scaled_for_ga: Any = False

    args: RelayTrainerConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: RelayTrainerConfig | None = None,
        *,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else RelayTrainerConfig("relay-model")
        _check_arguments(args, kwargs)
        options = cast(dict[str, Any] | None, args.model_init_kwargs)
        if isinstance(model, str):
            # TRL resolves a path by `architectures`, which only knows classes inside transformers.
            model = RelayForMaskedDiffusion.from_pretrained(model, **{"dtype": "float32", **(options or {})})
            args.model_init_kwargs = None  # used up; TRL would warn
        base = _relay_model(model, args)
        config = base.config
        if not args.carries_state and config.relay_channel != "none" and args.ddp_find_unused_parameters is None:
            # The channel gets no gradient then, which DDP has to be told.
            args.ddp_find_unused_parameters = True
        if peft_config is not None and config.relay_channel != "none":
            # A channel has a few thousand parameters: adapters would only get in its way.
            modules = sorted({*(peft_config.modules_to_save or []), "relay"})
            peft_config = copy.copy(peft_config)  # the caller's stays as it is
            peft_config.modules_to_save = modules
        own_forward = vars(base).get("forward")
        super().__init__(model, args, peft_config=peft_config, **kwargs)
        args.model_init_kwargs = options
        # TRL wraps `forward` for its own next-token loss, which is never computed here. A copied model would share it.
        vars(base).pop("forward", None)
        if own_forward is not None:
            base.forward = own_forward
        if args.carries_state and not any(p.requires_grad for p in base.relay.parameters()):
            raise ValueError(
                f"`objective={args.objective!r}` trains the relay channel, but it is frozen: pass the plain model with "
                "`peft_config`, or a PeftModel with `modules_to_save=['relay']` and `is_trainable=True`."
            )
        _check_special_tokens(self.processing_class, config)
        check_dataset(self.train_dataset, "training set", config.mask_token_id)
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, dataset in evaluated.items():
            check_dataset(dataset, f"data set `{name}`", config.mask_token_id)
        keep_caches_under_checkpointing(self.model)

        self.relay_config = config
        self.buffer = RolloutBuffer(config, args.carries_state)
        self.weight_average = WeightAverage(self.model, args.ema_decay) if args.ema_decay is not None else None
        self.add_callback(ChannelNorms(self._metrics["train"]))
        if self.weight_average is not None:
            self.add_callback(_FollowWeights(self.weight_average))

    # -- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The objective's loss on one micro-batch; in training, rollouts go on from the buffer.

        Evaluation starts every row from all masks and draws no random thresholds, so that two evaluations of the same
        weights give the same number.

        Raises:
            ValueError: outputs were asked for, as `predict` does.
        """
        if return_outputs:
            raise ValueError("A rollout has no single set of logits: call `evaluate`, or `generate` of the model.")
        if self.args.objective == "masked":
            return self._masked_loss(model, inputs)
        is_training = model.training
        if is_training:
            refilled = self.buffer.refill(inputs)
            rows = self.buffer.rows
        else:
            rows = fresh_rows(self.relay_config, inputs, self.args.carries_state)
            refilled = len(rows.clean_ids)
        result = run_rollout(model, self.relay_config, rows, self._policies(jitter=is_training), self.args.objective)
        if is_training:
            self.buffer.store(result.rows)
        self._record(is_training, rollout_metrics(result, refilled))
        return result.loss

    def _masked_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        rows = fresh_rows(self.relay_config, inputs, carries_state=False)
        generators = None
        if not model.training:
            # The same masks for a row in whatever order rows are evaluated (among rows padded to one length).
            seeds = (self.args.seed + (rows.clean_ids * rows.attention_mask).sum(-1)).tolist()
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows = mask_uniformly(rows, self.relay_config, generators)
        masked = rows.masked(self.relay_config.mask_token_id)
        self._record(model.training, {"masked_fraction": float(masked.sum()) / max(int(rows.maskable.sum()), 1)})
        return mean_loss(make_denoiser(model, self.relay_config, rows).step(rows, None).token_losses)

    def _policies(self, jitter: bool) -> list[UnmaskingPolicy]:
        """The reveal rule of every step; with jitter, each has its own threshold, moved back into the valid range."""
        name, threshold = self.args.unmasking_policy, self.args.unmasking_threshold
        noise = torch.zeros(self.args.rollout_steps)
        if jitter and self.args.threshold_jitter:
            noise = torch.randn(self.args.rollout_steps) * self.args.threshold_jitter
        highest = 1.0 if name == "confidence_threshold" else float("inf")
        return [make_policy(name, min(max(threshold + float(n), 0.0), highest)) for n in noise]

    def _record(self, is_training: bool, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics["train" if is_training else "eval"][name].append(value)

    # -- optimizer and averages ---------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the channel in groups of its own if it has its own learning rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.relay_learning_rate is not None:
            named = (self.model if model is None else model).named_parameters()
            channel = {id(parameter) for name, parameter in named if is_channel_parameter(name)}
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in channel]
                if moved:
                    group["params"] = [p for p in group["params"] if id(p) not in channel]
                    optimizer.add_param_group({**group, "params": moved, "lr": self.args.relay_learning_rate})
        return optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in SFTTrainer, with the averaged weights if there are any."""
        if self.weight_average is None:
            return super().evaluate(*args, **kwargs)
        with self.weight_average.applied():
            return super().evaluate(*args, **kwargs)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes our card into the output folder, in place of TRL's; arguments as there."""
        if not self.is_world_process_zero():
            return
        name = model_name or Path(self.args.output_dir).name
        card = training_card(name, self.args, self.relay_config, self.model, self.state.global_step, dataset_name)
        extra = [tags] if isinstance(tags, str) else list(tags or [])
        save_card(replace(card, tags=extra), self.args.output_dir)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    # The Trainer has no public hook for state that belongs to a checkpoint; `tests/trainers/test_resume.py` fails if
    # these three move.
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if tensors := self.buffer.state_dict():
            save_file(tensors, self._buffer_file(output_dir))
        if self.weight_average is not None and self.is_world_process_zero():
            save_file(self.weight_average.state_dict(), Path(output_dir) / WEIGHT_AVERAGE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if (path := self._buffer_file(checkpoint)).exists():
            self.buffer.load_state_dict(load_file(path, device=str(self.args.device)))
        self._load_weight_average(checkpoint)

    def _load_best_model(self) -> None:
        # The best score was measured with the average, and training ends by putting the average into the model.
        super()._load_best_model()
        self._load_weight_average(self.state.best_model_checkpoint)

    def _load_weight_average(self, checkpoint: str) -> None:
        """Every process has the average; a checkpoint without one starts it anew from the weights just loaded."""
        if self.weight_average is None:
            return
        if (path := Path(checkpoint) / WEIGHT_AVERAGE_FILE).exists():
            self.weight_average.load_state_dict(load_file(path, device=str(self.args.device)))
        else:
            self.weight_average.restart()

    def _buffer_file(self, folder: str) -> Path:
        """Each process has rows of its own."""
        return Path(folder) / f"rollout_buffer_{self.args.process_index}.safetensors"


def _check_arguments(args: Any, others: dict[str, Any]) -> None:
    """Refuses arguments of `SFTTrainer` that have no meaning for a relay model."""
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        if others.get(name) is not None:
            raise ValueError(f"`{name}` is not supported: a rollout has no single set of logits; leave it out.")
    if not isinstance(args, RelayTrainerConfig):
        raise ValueError(f"`args` is a {type(args).__name__}, which names no objective: pass a RelayTrainerConfig.")
    if args.relay_learning_rate is not None and any(others.get("optimizers") or ()):
        raise ValueError(
            "`relay_learning_rate` is not applied to a given optimizer: give its groups their rates, or leave one "
            "of the two out."
        )


def _relay_model(model: Any, args: RelayTrainerConfig) -> RelayForMaskedDiffusion:
    """The relay model itself, without PEFT around it, if the objective can be trained on it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, RelayForMaskedDiffusion):
        raise ValueError(
            f"`model` is a {type(base).__name__}, which has no relay channel: load it with "
            "`RelayForMaskedDiffusion.from_pretrained(path, mask_token_id=...)`."
        )
    if args.carries_state and base.config.relay_channel == "none":
        raise ValueError(
            f"`objective={args.objective!r}` trains a relay channel, but the model has `relay_channel='none'`: "
            "load it with `relay_channel='layer_norm'`, or choose `objective='rollout'` or `'masked'`."
        )
    return base


def _check_special_tokens(tokenizer: Any, config: RelayConfig) -> None:
    """The trainer writes the tokenizer's ids into the model, which could then be saved but not loaded."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        token_id = getattr(tokenizer, name, None)
        if token_id is not None and token_id >= config.text_config.vocab_size:
            raise ValueError(
                f"The tokenizer's `{name}` is {token_id}, but the model has {config.text_config.vocab_size} tokens: "
                "pass the model's own tokenizer, or call `model.resize_token_embeddings`."
            )


class _FollowWeights(TrainerCallback):
    """Updates the average after each optimizer step and leaves it in the model when training ends."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.average.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.average.copy_to_model()
