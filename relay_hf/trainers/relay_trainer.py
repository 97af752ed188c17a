"""RelayTrainer: TRL's SFTTrainer with the loss of a relay model. Wiring only; the work is in its siblings."""

import copy
import sys
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo, HfApi
from peft import PeftConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..hub import push
from ..hub_cards import save_card
from ..modeling import RelayConfig, RelayForMaskedDiffusion
from ..pictures.training import logged, plot_training
from .adapter_targets import check_targets
from .buffer import RolloutBuffer
from .card import TRAINING_PICTURE, training_card
from .checkpoints import ResumableTrainer
from .data_preparation import check_sources
from .denoiser import make_denoiser
from .ema import WeightAverage
from .metrics import ChannelNorms, RunningMeans, is_channel_parameter, record_rollout
from .model_checks import (
    channel_weights,
    check_arguments,
    check_learning,
    check_special_tokens,
    keep_channel_precise,
    load_reference,
    relay_model,
    with_adapter,
)
from .model_preparation import keep_caches_under_checkpointing
from .non_finite import StopOnNonFiniteGradient, check_loss
from .objectives import draw_masks, mean_of_positions, mean_of_rows
from .processes import check_deepspeed, mean_over_processes, return_full_precision, without_exchange
from .reference import Reference
from .relay_config import RelayTrainerConfig
from .rollout import Rollout
from .rows import fresh_rows
from .samples import describe_sample, write_samples
from .shortfall import ReportShortfall, check_loader
from .summary import describe_run

# PEFT looks up default targets by model type; ours are those of the usual backbones.
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(RelayConfig.model_type, ["q_proj", "v_proj"])


class RelayTrainer(ResumableTrainer):
    r"""Trains masked diffusion models with a relay channel (arXiv 2605.22967).

    Data sets are those of `SFTTrainer`: prompt-completion, conversational, plain text or pre-tokenised; what has a
    label is masked and learned, everything else stays visible.

    Args:
        model: a `RelayForMaskedDiffusion`, a `PeftModel` around one whose `modules_to_save` has `"relay"`, or a path or
            Hub id.
        args: training arguments; `objective` and its neighbours choose what is learned.
        reference_model: for `objective="residual_context"`: a frozen relay model, or its path or Hub id, whose
            predictions the trained one gets (it may be smaller); None = the trained model's own. Checkpoints do not
            hold it.
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
        reference_model: str | PreTrainedModel | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else RelayTrainerConfig("relay-model")
        check_arguments(args, kwargs)
        options = cast(dict[str, Any] | None, args.model_init_kwargs)
        if isinstance(model, str):
            # TRL resolves a path by `architectures`, which only knows classes inside transformers.
            model = RelayForMaskedDiffusion.from_pretrained(model, **{"dtype": "float32", **(options or {})})
            args.model_init_kwargs = None  # used up; TRL would warn
        model = with_adapter(model, peft_config)
        base = relay_model(model, args)
        config = base.config
        reference = load_reference(reference_model, args, base)
        if not args.recipe.uses_channel and config.relay_channel != "none" and args.ddp_find_unused_parameters is None:
            # The channel gets no gradient then, which DDP has to be told.
            args.ddp_find_unused_parameters = True
        check_targets(peft_config, base)
        if peft_config is not None and list(base.relay.parameters()):
            # A channel has a few thousand parameters: adapters would only get in its way.
            modules = sorted({*(peft_config.modules_to_save or []), "relay"})
            peft_config = copy.copy(peft_config)  # the caller's stays as it is
            peft_config.modules_to_save = modules
        check_sources(args, kwargs)
        self.relay_config = config
        own_forward, weights = vars(base).get("forward"), channel_weights(base)
        super().__init__(model, args, peft_config=peft_config, **kwargs)
        args.model_init_kwargs = options
        # TRL wraps `forward` for its own next-token loss, which is never computed here. A copied model would share it.
        vars(base).pop("forward", None)
        if own_forward is not None:
            base.forward = own_forward
        keep_channel_precise(base, weights)
        check_learning(self.model, args)
        if self.is_deepspeed_enabled:
            stage = self.accelerator.state.deepspeed_plugin.zero_stage
            check_deepspeed(args, args.recipe.uses_channel and base.relay.reads_distribution, stage)
        if args.sample_rows and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError("`sample_rows` needs whole weights to write with, but they are sharded: set it to 0.")
        return_full_precision(self.accelerator)
        check_special_tokens(self.processing_class, config)
        keep_caches_under_checkpointing(self.model)

        train_set = kwargs.get("train_dataset")
        self.rows_given = len(train_set) if hasattr(train_set, "__len__") else None  # before any was left out
        self.means, self.eval_means = RunningMeans(), RunningMeans()
        self._eval_prefix: str | None = None  # of an evaluation's metrics, while it runs
        self.recipe = args.recipe
        self.buffer = RolloutBuffer(config, self.recipe.keeps_state, args.buffer_queue_size, args.staggered_start)
        self.reference = None
        if reference is not None:
            self.reference = Reference(self.accelerator.prepare_model(reference, evaluation_mode=True), base)
        self.weight_average = WeightAverage(self.model, args.ema_decay) if args.ema_decay is not None else None
        self.add_callback(StopOnNonFiniteGradient())
        self.add_callback(ChannelNorms(self.means))
        self.add_callback(ReportShortfall(self.buffer))
        if self.weight_average is not None:
            self.add_callback(_FollowWeights(self.weight_average))

    def summary(self) -> str:
        """What training would do, a fact a line: rows, objective, steps, parameters, memory, and the first row."""
        return describe_run(self)

    # -- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The objective's loss on one micro-batch; in training, rollouts go on from the buffer.

        All windows of the rollout but the last are differentiated here, which leaves one to the Trainer. Evaluation
        starts every row from all masks, draws no random thresholds and gives every row the same weight, so that two
        evaluations of the same weights give the same number, whatever the batch size.

        Raises:
            ValueError: outputs were asked for, as `predict` does.
            FloatingPointError: the loss is infinite or NaN.
        """
        if return_outputs:
            raise ValueError("A rollout has no single set of logits: call `evaluate`, or `generate` of the model.")
        is_training = model.training
        rollout = self._begin_rollout(model, inputs, is_training)
        earlier = torch.zeros((), device=self.args.device)
        while rollout.windows_left > 1:
            # Processes exchange gradients once, when the Trainer differentiates the last window.
            with without_exchange(self.accelerator, model):
                loss = rollout.run_window()
                check_loss(loss, rollout.step_losses, self.state.global_step)
                with torch.autocast(self.args.device.type, enabled=False):
                    self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
            earlier += loss.detach()
        loss = rollout.run_window()
        if is_training:
            check_loss(loss, rollout.step_losses, self.state.global_step)
            if self.recipe.uses_buffer:
                self.buffer.store(rollout.rows)
        record_rollout(self.means if is_training else self.eval_means, rollout, reveals=self.recipe.uses_buffer)
        return earlier + loss

    def _begin_rollout(self, model: Any, inputs: dict[str, Tensor], is_training: bool) -> Rollout:
        args, config, recipe = self.args, self.relay_config, self.recipe
        if recipe.uses_buffer and is_training:
            # The public `args.train_batch_size` is not the one that `auto_find_batch_size` found.
            refilled = self.buffer.refill(inputs, slots=self._train_batch_size)
            self.means.add({"buffer_refills": float(refilled), "buffer_queue": float(len(self.buffer.queue))})
            rows = self.buffer.rows
        else:
            rows = fresh_rows(config, inputs, recipe.keeps_state)
            rows = rows if recipe.uses_buffer else draw_masks(args, config, rows, is_random=is_training)
        advances = recipe.advances(args, config, is_training)
        reduce_loss = mean_of_positions(recipe, self._share) if is_training else mean_of_rows(recipe)
        window = args.gradient_window if is_training else None
        make = partial(make_denoiser, rows=rows, clean_block_starts=args.clean_block_starts)
        reference = make(self.reference, self.reference.config) if self.reference is not None else None
        return Rollout(make(model, config), rows, advances, recipe.carry, reduce_loss, window, reference)

    def _share(self, count: Tensor) -> Tensor:
        """This process's share of a count over all processes, which makes the mean of their losses exact."""
        return mean_over_processes(self.accelerator, count) if self.args.average_tokens_across_devices else count

    def get_train_dataloader(self) -> DataLoader:
        """As in SFTTrainer.

        Raises:
            ValueError: it has no batch.
        """
        loader = super().get_train_dataloader()
        check_loader(loader, self.args)
        return loader

    # -- optimizer and averages ---------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the channel in a group of its own if it is treated in its own way.

        A channel that the objective does not use is left out: it would have no state to save, which FSDP2 refuses to
        load again.
        """
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and (self.args.has_channel_groups or not self.recipe.uses_channel):
            own = {"lr": self.args.relay_learning_rate, "weight_decay": self.args.relay_weight_decay}
            own = {name: value for name, value in own.items() if value is not None}
            named = (self.model if model is None else model).named_parameters()
            channel = {id(parameter) for name, parameter in named if is_channel_parameter(name)}
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in channel]
                group["params"] = [p for p in group["params"] if id(p) not in channel]
                if moved and self.recipe.uses_channel:
                    optimizer.add_param_group({**group, "params": moved, **own})
        return optimizer

    # -- evaluation and logging ---------------------------------------------------------------------------------------

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, whatever the data set.

        Raises:
            ValueError: always.
        """
        raise ValueError("A rollout has no single set of logits: call `evaluate`, or `generate` of the model.")

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in SFTTrainer, with the averaged weights if there are any; all metrics of a data set have its prefix."""
        outer, self._eval_prefix = self._eval_prefix, metric_key_prefix
        try:
            with nullcontext() if self.weight_average is None else self.weight_average.applied():
                self._sample(self.eval_dataset if eval_dataset is None else eval_dataset, metric_key_prefix)
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._eval_prefix = outer

    def _sample(self, dataset: Any, prefix: str) -> None:
        """Prints and notes what the model writes; of several sets, each comes here by itself."""
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        is_prepared = {"input_ids", "labels"} <= set(getattr(dataset, "column_names", None) or ())
        if not self.args.sample_rows or not is_prepared or not self.is_world_process_zero():
            return
        with self.accelerator.autocast():
            samples = list(write_samples(self.accelerator.unwrap_model(self.model), dataset, self.args))
        tokenizer: Any = self.processing_class
        note: dict[str, Any] = {f"{prefix}_samples": [tokenizer.decode(sample.tokens) for sample in samples]}
        self.state.log_history.append({**note, "step": self.state.global_step})
        for sample in samples:
            self.eval_means.add({f"sample_{kind}_forwards": count for kind, count in sample.forwards.items()})
            tqdm.write(describe_sample(sample, tokenizer), file=sys.stdout)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in SFTTrainer, with what the rollouts showed since the last time."""
        if self._eval_prefix is None:
            logs.update(self.means.pop())
        else:
            logs.update({f"{self._eval_prefix}_{name}": value for name, value in self.eval_means.pop().items()})
        super().log(logs, start_time)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes our card into the output folder, in place of TRL's; arguments as there, with any number of data sets.

        Without `dataset_name`, a data set that was loaded from the Hub names itself.
        """
        if not self.is_world_process_zero():
            return
        name = model_name or Path(self.args.output_dir).name
        history, picture = self.state.log_history, None
        if len(logged(history, "loss")) > 1:
            place = Path(self.args.output_dir) / TRAINING_PICTURE
            picture = plot_training(history, place, f"Training of {name}").name
        card = training_card(
            name,
            self.args,
            self.relay_config,
            self.model,
            self.state,
            model_id=str(Path(self.args.output_dir).resolve()),
            train_dataset=self.train_dataset,
            tokenizer=cast(Any, self.processing_class),
            dataset_names=[dataset_name] if isinstance(dataset_name, str) else dataset_name or [],
            reference=self.reference,
            picture=picture,
        )
        extra = [tags] if isinstance(tags, str) else list(tags or [])
        save_card(replace(card, tags=extra), self.args.output_dir)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Saves the model and uploads it as `relay_hf.push` does; arguments as in the Trainer.

        Returns: the commit, a `Future` of it if not `blocking`, and None in all processes but the first.
        Raises: those of `push`.
        """
        token = token if token is not None else self.args.hub_token
        self.save_model(_internal_call=True)  # by all processes together
        if not self.is_world_process_zero():
            return None
        repo_id = self.args.hub_model_id or Path(self.args.output_dir).name
        if "/" not in repo_id:
            repo_id = f"{HfApi(token=token).whoami()['name']}/{repo_id}"
        kwargs.setdefault("tags", list(getattr(self.model, "model_tags", None) or []))
        self.create_model_card(**{"model_name": repo_id.split("/")[1], **kwargs})
        # Of a checkpoint. The Trainer has no public way to wait for it, and two commits would be in each other's way.
        self._finish_current_push()
        send = partial(
            push,
            self.args.output_dir,
            repo_id,
            private=private if private is not None else self.args.hub_private_repo,
            token=token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
        )
        return send() if blocking else HfApi().run_as_future(send)


class _FollowWeights(TrainerCallback):
    """Updates the average after each optimizer step and leaves it in the model when training ends."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.average.updates == 0:
            self.average.restart()  # the model may be sharded by now

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.average.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.average.copy_to_model()
