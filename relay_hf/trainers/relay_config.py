"""RelayTrainerConfig: the training arguments of a relay model."""

from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig

from ..modeling import make_policy
from ..modeling.unmasking_relay import POLICIES
from .objectives import RECIPES, Recipe

NOT_NEGATIVE = "is not a number of at least 0: give one, or None"  # YAML, for one, takes 1e-3 for a text
# Option -> its kind and least value, and what a message says of any other value.
NUMBERS: dict[str, tuple[Any, int, str]] = {
    "rollout_steps": (int, 1, "must be at least 1, and whole: a rollout has K >= 1 steps"),
    "unmasking_count": (int, 1, "must be at least 1, and whole: a step reveals something"),
    "trace_stride": (int, 1, "must be at least 1, and whole: a step follows at least one of the trace"),
    "gradient_window": (int | None, 1, "must be at least 1, and whole; `None` differentiates all steps together"),
    "sub_block_size": (int | None, 1, "must be at least 1, and whole; `None` takes blocks as a whole"),
    "sample_rows": (int, 0, "is negative, or not whole: 0 means no samples"),
    # TRL would take a negative one for a number of tokens to cut off at the end.
    "max_length": (int | None, 1, "must be at least 1, and whole; `None` keeps texts whole"),
    "threshold_jitter": (int | float, 0, "is a standard deviation: it must be a number of at least 0"),
    "loss_weight_cap": (int | float | None, 1, "is below 1, the least weight: give a larger number, or None"),
    "z_loss": (int | float, 0, "is a coefficient: it must be a number of at least 0"),
    "relay_learning_rate": (int | float | None, 0, NOT_NEGATIVE),
    "relay_weight_decay": (int | float | None, 0, NOT_NEGATIVE),
}


@dataclass
class RelayTrainerConfig(SFTConfig):
    r"""Arguments of `RelayTrainer`, beside all those of TRL's `SFTConfig` and transformers' `TrainingArguments`.

    Args:
        objective: what is learned (arXiv 2605.22967, Algorithm 1 and its ablations), or the name of an objective that
            `relay_hf.register_objective` has added.
            `"relay"`: K denoising steps, the state is carried and gradients flow through it.
            `"relay_sg"`: the state is carried, gradients stop between steps.
            `"rollout"`: K denoising steps without a state.
            `"traces"`: K denoising steps along a trace of decoding that each row brings in a column `reveal_steps`
            (`relay-hf traces` writes such rows); a step reveals what the trace reveals in `trace_stride` steps. The
            state is carried, with its gradient, as far as the model's channel allows.
            `"residual_context"`: masked diffusion in which each [MASK] carries what a first pass over the same text
            predicts there: that of `RelayTrainer(reference_model=...)`, a frozen model trained with `"masked"` or
            `"complementary"` (arXiv 2601.22954), or else of the model itself (as arXiv 2510.17206 trains
            soft-masking). Gradients never enter that pass. Needs a channel that reads distributions.
            `"masked"`: plain masked diffusion, one step from a uniformly drawn fraction of masks.
            `"complementary"`: the plain fine-tuning of Fast-dLLM v2 (arXiv 2509.26328): such a mask and its complement,
            so that every position is learned once.
        rollout_steps: K, denoising steps per micro-batch. The last three objectives have one, one and two steps,
            whatever is set here.
        step_reduction: `"sum"`: the losses of the K steps are added, as Relay's are; `"mean"`: their mean, as PUMBA's
            (arXiv 2609.37974).
        loss_weight_cap: `None`: every masked position of a micro-batch has the same weight, as in Relay. A number c
            (PUMBA: 5): it weighs min(1/t, c), t the masked fraction of its block (of the row without blocks), and the
            sum is divided by the learned positions of blocks that still hold a mask. In evaluation, all weigh the same.
        z_loss: how much of the squared logarithm of the partition function the loss of a position includes (PUMBA:
            1e-5); not in evaluation.
        gradient_window: number of steps that are differentiated together; None = all. Gradients do not cross the
            border of a window, and no more than one window of activations is in memory. Where no gradient flows
            between steps (every objective but `"relay"`), 1 saves memory and changes nothing else.
        trace_stride: steps of a trace that `objective="traces"` follows in one denoising step; more than 1 teaches the
            model to write the same text in as many times fewer forwards. No other objective reads it.
        unmasking_policy: reveal rule of the rollout, the same objects as in `generate`.
        unmasking_threshold: what the policy compares with.
        unmasking_count: how many of the surest positions of a block (of a canvas) `"confidence_threshold"` reveals in
            any case: PUMBA's u, which is larger in training than in decoding, where each row would otherwise be seen in
            many steps in a row, and learned by heart.
        sub_block_size: positions of a block revealed before the next ones are looked at, as in `generate`; None = a
            step may reveal any position of a block (the published rule for training; 8 would be its
            "decode_aligned").
        clean_block_starts: for token-shift models, whether the first token of a block is learned from the clean text
            before it, which is what decoding reads it from. The published training reads it from the noisy block
            before, and leaves the first tokens of blocks to what the base model knows.
        threshold_jitter: standard deviation of Gaussian noise on the threshold, drawn per step (Sudoku recipe: 0.1).
            Evaluation uses the threshold itself.
        rows_on_demand: whether a row is drawn when a place in the rollout buffer is free, so that each epoch reveals
            every row once; the number of steps is then estimated, unless `max_steps` sets it. False = every batch
            brings rows, and those that find no free place are dropped, as in the published code.
        staggered_start: whether the first rows of the buffer start with different fractions revealed, so that they do
            not all finish together. With `rows_on_demand` they come once more, with nothing revealed.
        relay_learning_rate: learning rate of the channel; `None` = `learning_rate`.
        relay_weight_decay: weight decay of the channel; `None` = none, as for every norm and bias.
        ema_decay: decay of an exponential moving average of the weights, ramped up as (1 + n) / (10 + n). The average
            is what is evaluated, saved and left in the model when training ends; checkpoints keep the weights that
            training goes on from in a file beside it. `None` = no average.
        sample_rows: at each evaluation the model answers the prompts of that many rows of each evaluation set. Its
            texts are printed, with the forwards they took, and kept in `state.log_history`; the mean numbers of
            forwards go to the trackers. 0 = none.

    Packing: with TRL's `packing=True`, texts that are shorter than `max_length` share rows, and each sees only itself,
    so that losses and gradients are those of padded rows. TRL's own packing, which cuts and joins texts, is not used.
    `eval_packing` does the same for evaluations; None = as `packing`. `per_device_train_batch_size` counts rows of
    `max_length` positions, which the rollout buffer fills; objectives without a buffer pack the texts of a batch.

    Gradient accumulation and processes: the loss of a step is a mean over the masked positions of its micro-batch. With
    `average_tokens_across_devices` (the default) the micro-batch counts as one over all processes, so that n processes
    with b rows each equal one process with n * b rows. Micro-batches that are accumulated are averaged with equal
    weight: in what order their rows are revealed depends on the model, so their counts are not known beforehand.

    Raises:
        ValueError: a value that cannot be trained with.
    """

    objective: str = field(default="relay", metadata={"help": f"One of {', '.join(RECIPES)}."})
    rollout_steps: int = field(default=2, metadata={"help": "K, denoising steps per rollout."})
    step_reduction: str = field(default="sum", metadata={"help": "Losses of the steps: sum or mean."})
    loss_weight_cap: float | None = field(default=None, metadata={"help": "c of the weight min(1/t, c); no weight."})
    z_loss: float = field(default=0.0, metadata={"help": "Part of the squared log partition function in a loss."})
    gradient_window: int | None = field(default=None, metadata={"help": "Steps differentiated together; all."})
    trace_stride: int = field(default=2, metadata={"help": "Steps of a trace that one denoising step follows."})
    unmasking_policy: str = field(default="confidence_threshold", metadata={"help": "Reveal rule of the rollout."})
    unmasking_threshold: float = field(default=0.85, metadata={"help": "What the reveal rule compares with."})
    unmasking_count: int = field(default=1, metadata={"help": "Positions that a step reveals in any case."})
    sub_block_size: int | None = field(default=None, metadata={"help": "Part of a block revealed first; all of it."})
    clean_block_starts: bool = field(default=False, metadata={"help": "Learn block starts as decoding reads them."})
    threshold_jitter: float = field(default=0.0, metadata={"help": "Standard deviation of noise on the threshold."})
    rows_on_demand: bool = field(default=True, metadata={"help": "Draw rows when a place is free; drop none."})
    staggered_start: bool = field(default=True, metadata={"help": "Start rows with different fractions revealed."})
    relay_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the channel."})
    relay_weight_decay: float | None = field(default=None, metadata={"help": "Weight decay of the channel."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of the moving average of the weights."})
    # The Trainer's filter would wait for the device in every step; a loss that is not finite ends the run anyway.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN out of the logged loss."})
    sample_rows: int = field(default=0, metadata={"help": "Rows whose prompts are answered at each evaluation."})

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            # The libraries' defaults expect a GPU; a plain configuration should run on a laptop, and quietly.
            self.bf16 = False if self.bf16 is None else self.bf16
            self.dataloader_pin_memory = False
        for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            # transformers 5.24 has new names, and warns if only the old ones are set, as TRL's defaults do.
            if getattr(self, new := name.replace("gradient", "activation"), ...) is None:
                setattr(self, new, getattr(self, name))
        super().__post_init__()
        if RECIPES.find(self.objective).follows_traces:
            self.remove_unused_columns = False  # the Trainer would take the column of traces for one
        for name, (kind, least, problem) in NUMBERS.items():
            value = getattr(self, name)
            if not (isinstance(value, kind) and (value is None or value >= least)):
                raise ValueError(f"`{name}={value!r}` {problem}.")
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs <= 0):
            raise ValueError(
                f"`max_steps={self.max_steps}` with `num_train_epochs={self.num_train_epochs}` trains nothing: give a "
                "positive number of one of them, and `max_steps=-1` to count epochs."
            )
        rule = POLICIES.find(self.unmasking_policy)
        if rule.needs_steps:
            raise ValueError(
                f"`unmasking_policy={self.unmasking_policy!r}` spreads positions over the steps of a whole text, of "
                "which training takes a few: keep it for decoding, and choose another."
            )
        policy = make_policy(self.unmasking_policy, self.unmasking_threshold, unmasking_count=self.unmasking_count)
        if policy.reads != "confidence":
            raise ValueError(
                f"`unmasking_policy={self.unmasking_policy!r}` reads the {policy.reads} of distributions, which "
                "training does not compute: keep it for decoding, and choose one that reads probabilities."
            )
        if self.threshold_jitter and (rule.bounds is None or rule.bounds.is_whole):
            raise ValueError(
                f"`threshold_jitter={self.threshold_jitter}` would make a fraction of the threshold, but that of "
                f"`unmasking_policy={self.unmasking_policy!r}` is a whole number, or none: set it to 0."
            )
        if self.step_reduction not in ("sum", "mean"):
            raise ValueError(f"`step_reduction={self.step_reduction!r}` is unknown: choose 'sum' or 'mean'.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay={self.ema_decay}` must lie strictly between 0 and 1; `None` switches it off.")
        if self.ema_decay is not None and self.load_best_model_at_end and self.save_only_model:
            raise ValueError(
                "`save_only_model=True` drops the moving average that `load_best_model_at_end=True` must restore: set "
                "one of them to False, or `ema_decay=None`."
            )
        if self.padding_free:
            raise ValueError(
                "`padding_free=True` flattens a batch into one row, in which a text could not be denoised by itself: "
                "leave it out; `packing=True` saves the padding."
            )
        if self.packing or self.eval_packing:
            self._check_packing()
        if self.draws_rows and self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "`train_sampling_strategy='batch_rebalance'` evens out batches, but rows are drawn one by one: choose "
                "another, or set `rows_on_demand=False`."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor={self.label_smoothing_factor}` has no effect on these losses: leave it out."
            )
        if self.loss_type != "nll":
            raise ValueError(
                f"`loss_type={self.loss_type!r}` has no meaning here: `objective` names the loss; leave it out."
            )

    def _check_packing(self) -> None:
        if self.max_length is None:
            raise ValueError(
                "`packing` and `eval_packing` put texts side by side into rows of `max_length` positions, but "
                "`max_length=None`: give a number."
            )
        if self.packing_strategy != "bfd":
            raise ValueError(
                f"`packing_strategy={self.packing_strategy!r}` cuts texts into pieces, but a text stays whole "
                "here: leave it out."
            )

    @property
    def recipe(self) -> Recipe:
        """What `objective` means."""
        return RECIPES[self.objective]

    @property
    def draws_rows(self) -> bool:
        """Whether rows are drawn one by one, and not by the batch."""
        return self.rows_on_demand and self.recipe.uses_buffer

    @property
    def estimates_steps(self) -> bool:
        """Whether the end of the rows ends the training, and the number of steps is known only then."""
        return self.draws_rows and self.max_steps <= 0

    @property
    def has_channel_groups(self) -> bool:
        """Whether the optimizer treats the channel in a way of its own."""
        return self.relay_learning_rate is not None or self.relay_weight_decay is not None

    def packs(self, is_training: bool) -> bool:
        """Whether texts share rows in training, or in evaluation, where `packing` decides if `eval_packing` is None."""
        return bool(self.packing if is_training or self.eval_packing is None else self.eval_packing)
