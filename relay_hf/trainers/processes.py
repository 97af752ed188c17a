"""Training on several processes: checks of arguments, precision, and exchange of gradients."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .relay_config import RelayTrainerConfig


def check_sharding(trainer: Any, reads_distribution: bool) -> None:
    """Raise if an argument cannot be combined with DeepSpeed or FSDP, where one of them is used.

    Args:
        trainer: a `Trainer` with our arguments.
        reads_distribution: whether the objective uses a channel that reads distributions.

    Raises:
        ValueError: an argument needs whole weights, or single backward passes, that sharding does not offer.
    """
    if trainer.is_deepspeed_enabled:
        _check_deepspeed(trainer.args, reads_distribution, trainer.accelerator.state.deepspeed_plugin.zero_stage)
    if trainer.args.sample_rows and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        raise ValueError("`sample_rows` needs whole weights to write with, but they are sharded: set it to 0.")


def _check_deepspeed(args: RelayTrainerConfig, reads_distribution: bool, zero_stage: int) -> None:
    if reads_distribution and zero_stage == 3:
        raise ValueError(
            "The relay channel reads the embeddings in one piece, which ZeRO stage 3 divides: use stage 2, or train "
            "with FSDP."
        )
    if args.ema_decay is not None:
        raise ValueError(
            "`ema_decay` needs the weights, which DeepSpeed keeps to itself: set `ema_decay=None`, or train with FSDP."
        )
    if args.gradient_window is not None:
        raise ValueError(
            "`gradient_window` needs several backward passes per step, each of which DeepSpeed takes for a step: set "
            "`gradient_window=None`, or train with FSDP."
        )


def return_full_precision(accelerator: Accelerator) -> None:
    """Keeps accelerate from making FSDP2 return everything in half precision: losses and confidences are fp32."""
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version == 2 and fsdp.mixed_precision_policy is not None:
        fsdp.mixed_precision_policy = replace(fsdp.mixed_precision_policy, output_dtype=None)


def without_exchange(accelerator: Accelerator, model: Any) -> AbstractContextManager[None]:
    """Context without gradient synchronisation; DDP needs it on one process, too, where accelerate's does nothing."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else accelerator.no_sync(model)


def mean_over_processes(accelerator: Accelerator, count: Tensor) -> Tensor:
    """The mean of a count over processes."""
    return count if accelerator.num_processes == 1 else accelerator.reduce(count, reduction="mean")
