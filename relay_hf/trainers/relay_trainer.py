"""RelayTrainer: TRL's SFTTrainer with the loss of a relay model. It connects the other modules of this folder."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel

from ..modeling import RelayConfig
from .channel_parameters import keeps_channel_precise, separate_channel
from .data.preparation import check_sources
from .data.traces import TraceCollator
from .ema import FollowWeights, WeightAverage
from .epochs import CountEpochs
from .metrics import ChannelNorms, RunningMeans, record_rollout
from .model_checks import check_arguments, check_learning, check_special_tokens
from .model_preparation import KeepCaches, hidden, keeps_forward, prepare_model
from .no_batch import RefuseNoBatch
from .non_finite import FiniteCheck
from .objectives import capped_mean, draw_masks, mean_of_positions, mean_of_rows
from .processes import check_sharding, mean_over_processes, return_full_precision, without_exchange
from .publishing import PublishingTrainer
from .relay_config import RelayTrainerConfig
from .rollouts.buffer import RolloutBuffer
from .rollouts.denoiser import make_denoiser
from .rollouts.packed_buffer import PackedBuffer
from .rollouts.packing import Layout
from .rollouts.reference import Reference
from .rollouts.rollout import Rollout
from .rollouts.rows import RolloutRows, fresh_rows
from .samples import show_samples
from .summary import describe_run
from .throughput import Throughput

NO_LOGITS = "A rollout has no single set of logits: call `evaluate`, or `generate` of the model."


class RelayTrainer(PublishingTrainer):
    r"""Trains masked diffusion models with a relay channel (arXiv 2605.22967).

    Data sets are those of `SFTTrainer`: prompt-completion, conversational, plain text or pre-tokenised. Tokens with a
    label are masked and learned, all others stay visible.

    Args:
        model: a `RelayForMaskedDiffusion`, a `PeftModel` around one whose `modules_to_save` has `"relay"`, or a path or
            Hub id.
        args: training arguments; `objective` chooses what is learned.
        reference_model: for `objective="residual_context"`: a frozen relay model, or its path or Hub id, whose
            predictions the trained model receives; it may be smaller, and checkpoints do not hold it. None = the
            trained model's own predictions.
        peft_config: configuration of adapters, which are trained instead of the whole model; the channel is always
            trained in full.
        kwargs: all other arguments of `SFTTrainer` (`train_dataset`, `processing_class`, `callbacks`, ...).

    Raises:
        ValueError: `model` or `args` is not of this library, the channel that the objective needs is missing or frozen,
            no position of the data set has a label, or an argument of `SFTTrainer` was given that has no meaning
            here.

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
        prepared = prepare_model(model, args, peft_config, reference_model)
        check_sources(args, kwargs)
        base, config, recipe = prepared.base, prepared.base.config, args.recipe
        if not recipe.uses_channel and config.relay_channel != "none" and args.ddp_find_unused_parameters is None:
            # The channel gets no gradient, and DDP must not wait for one.
            args.ddp_find_unused_parameters = True
        train_set = kwargs.get("train_dataset")
        self.rows_given = len(train_set) if hasattr(train_set, "__len__") else None  # before rows were left out
        self.relay_config: RelayConfig = config
        self.recipe = recipe = recipe.for_channel(config.relay_channel)
        make_buffer = partial(PackedBuffer, args.max_length) if args.packing else RolloutBuffer
        self.buffer = make_buffer(
            config,
            recipe.keeps_state,
            args.staggered_start,
            not args.rows_on_demand,
            args.device,
            has_traces=recipe.follows_traces,
        )
        self.means, self.eval_means = RunningMeans(), RunningMeans()
        self.check_finite = FiniteCheck()
        self._eval_prefix: str | None = None  # prefix of the metrics while an evaluation runs
        if args.draws_rows:
            has_scheduler = kwargs.get("optimizers", (None, None))[1] is not None
            counting = CountEpochs(self, follows=not has_scheduler)
            kwargs["callbacks"] = [counting, *(kwargs.get("callbacks") or [])]

        # `model_init_kwargs` are used up if the model was loaded here; texts are packed here, and not by TRL.
        ours = ("packing", "model_init_kwargs") if isinstance(model, str) else ("packing",)
        with keeps_forward(base), keeps_channel_precise(base), hidden(args, *ours):
            super().__init__(prepared.model, args, peft_config=prepared.peft_config, **kwargs)
        check_learning(self.model, args)
        check_sharding(self, recipe.uses_channel and base.relay.reads_distribution)
        check_special_tokens(self.processing_class, config)
        return_full_precision(self.accelerator)
        self.add_callback(KeepCaches())
        if recipe.follows_traces:
            self.data_collator = TraceCollator(self.data_collator)

        self.weight_average = WeightAverage(self.model, args.ema_decay) if args.ema_decay is not None else None
        self.reference: Reference | None = None
        if prepared.reference is not None:
            frozen = self.accelerator.prepare_model(prepared.reference, evaluation_mode=True)
            self.reference = Reference(frozen, base)
        self.throughput = Throughput(self.means)
        self.add_callback(self.throughput)
        self.add_callback(ChannelNorms(self.means))
        self.add_callback(RefuseNoBatch())
        if self.weight_average is not None:
            self.add_callback(FollowWeights(self.weight_average))

    def summary(self) -> str:
        """The training, one fact a line: rows, objective, steps, parameters, memory, and the first row."""
        return describe_run(self)

    # -- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The objective's loss on one micro-batch; in training, rollouts continue with the rows of the buffer.

        This method differentiates all windows of the rollout but the last, which the Trainer differentiates. Evaluation
        masks the learned positions of every row at first, draws no random thresholds and gives every row the same
        weight, so that two evaluations of the same weights give the same number for any batch size.

        Raises:
            ValueError: `return_outputs` is True.
        """
        if return_outputs:
            raise ValueError(NO_LOGITS)
        is_training = model.training
        rollout = self._begin_rollout(model, inputs, is_training)
        earlier = torch.zeros((), device=self.args.device)
        while rollout.windows_left > 1:
            # Processes exchange gradients once, when the Trainer differentiates the last window.
            with without_exchange(self.accelerator, model):
                loss = rollout.run_window()
                with torch.autocast(self.args.device.type, enabled=False):
                    self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
            earlier += loss.detach()
        loss = rollout.run_window()
        if is_training:
            self.check_finite.losses.append(rollout.step_losses)
            if self.is_deepspeed_enabled:  # its backward pass takes the optimizer step, too
                self.check_finite(self.state.global_step)
            if self.recipe.uses_buffer:
                self.buffer.store(rollout.rows)
        record_rollout(self.means if is_training else self.eval_means, rollout, reveals=self.recipe.uses_buffer)
        return earlier + loss

    def _begin_rollout(self, model: Any, inputs: dict[str, Tensor], is_training: bool) -> Rollout:
        args, config, recipe = self.args, self.relay_config, self.recipe
        lengths: list[int] | None = None  # of the texts, where nothing has to be waited for to know them
        if recipe.uses_buffer and is_training:
            # The public `args.train_batch_size` is not the one that `auto_find_batch_size` found.
            new_rows = self.buffer.refill(self._drawn(inputs), slots=self._train_batch_size)
            self.means.add({"buffer_refills": float(new_rows)})
            rows, lengths = self.buffer.rows, self.buffer.lengths
        elif recipe.uses_buffer:
            rows = fresh_rows(config, inputs, recipe.keeps_state, args.device)
        else:
            rows = draw_masks(args, config, fresh_rows(config, inputs, recipe.keeps_state), is_training)
            new_rows, lengths = len(rows), rows.attention_mask.sum(-1).tolist()
            rows = rows.to(args.device)
        layout = Layout(rows, args.max_length, config.block_size, lengths) if args.packs(is_training) else None
        if is_training:
            self.throughput.add(rows, new_rows, layout)
        advances = recipe.advances(args, config, is_training)
        reduce_loss = self._training_mean() if is_training else mean_of_rows(recipe)
        window = args.gradient_window if is_training else None
        make = partial(make_denoiser, rows=rows, clean_block_starts=args.clean_block_starts, layout=layout)
        denoiser = make(model, config, z_loss=args.z_loss if is_training else 0.0)
        reference = make(self.reference, self.reference.config) if self.reference is not None else None
        averages = args.step_reduction == "mean"
        return Rollout(denoiser, rows, advances, recipe.carry, reduce_loss, window, averages, reference)

    def _training_mean(self) -> Callable[[Tensor, RolloutRows], Tensor]:
        cap = self.args.loss_weight_cap
        if cap is None:
            return mean_of_positions(self.recipe, self._share)
        return capped_mean(cap, self.relay_config.block_size, self._share)

    def _share(self, count: Tensor) -> Tensor:
        """The mean of a count over processes: losses divided by it have as their mean that of all rows."""
        return mean_over_processes(self.accelerator, count) if self.args.average_tokens_across_devices else count

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The norm that clipping has computed, on the host: the Trainer has no public place for it before a step.

        Raises:
            FloatingPointError: the gradient, or a loss since the last step, is infinite or NaN.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        return self.check_finite(self.state.global_step, norm, norm_may_overflow=self.args.fp16)

    # -- optimizer and averages ---------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer; a channel with its own learning rate gets a group; an unused one is left out."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and (self.args.has_channel_groups or not self.recipe.uses_channel):
            separate_channel(optimizer, self.model if model is None else model, self.args)
        return optimizer

    # -- evaluation and logging ---------------------------------------------------------------------------------------

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported.

        Raises:
            ValueError: always.
        """
        raise ValueError(NO_LOGITS)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in SFTTrainer, with the averaged weights if there are any; all metrics have the prefix of the data set."""
        outer, self._eval_prefix = self._eval_prefix, metric_key_prefix
        try:
            with nullcontext() if self.weight_average is None else self.weight_average.applied():
                show_samples(self, self.eval_dataset if eval_dataset is None else eval_dataset, metric_key_prefix)
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._eval_prefix = outer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in SFTTrainer, with the means of the rollouts since the last call."""
        if self._eval_prefix is None:
            logs.update(self.means.pop())
        else:
            logs.update({f"{self._eval_prefix}_{name}": value for name, value in self.eval_means.pop().items()})
        super().log(logs, start_time)
