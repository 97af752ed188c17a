"""Checks of arguments, of what is trained and of the tokenizer, before work starts."""

from typing import Any

from peft import PeftModel
from torch import nn

from ..modeling import RelayConfig
from .channel_parameters import is_channel_parameter
from .relay_config import RelayTrainerConfig


def check_arguments(args: Any, others: dict[str, Any]) -> None:
    """Raise if an argument of `SFTTrainer` has no meaning for a relay model.

    Args:
        args: the training arguments.
        others: the trainer's other keyword arguments.

    Raises:
        ValueError: an argument has no meaning.
    """
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        if others.get(name) is not None:
            raise ValueError(f"`{name}` is not supported: a rollout has no single set of logits; leave it out.")
    if not isinstance(args, RelayTrainerConfig):
        raise ValueError(f"`args` is a {type(args).__name__}, which has no `objective`: pass a RelayTrainerConfig.")
    if args.activation_offloading and args.device.type == "cpu":
        raise ValueError(
            "`activation_offloading=True` moves activations from an accelerator to main memory, where a CPU has them "
            "anyway: leave it out."
        )
    if args.has_channel_groups and any(others.get("optimizers") or ()):
        raise ValueError(
            "`relay_learning_rate` and `relay_weight_decay` are not applied to a given optimizer: give its groups "
            "their values, or leave the optimizer out."
        )


def check_learning(model: nn.Module, args: RelayTrainerConfig) -> None:
    """Raise if the parameters that the objective trains are frozen; `model` is already prepared by `SFTTrainer`.

    Raises:
        ValueError: the channel or the adapter is frozen.
    """
    channel = [p for name, p in model.named_parameters() if is_channel_parameter(name)]  # empty for a residual context
    if args.recipe.uses_channel and channel and not any(parameter.requires_grad for parameter in channel):
        raise ValueError(
            f"`objective={args.objective!r}` trains the relay channel, but it is frozen: pass the plain model with "
            "`peft_config`, or a PeftModel with `modules_to_save=['relay']` and `is_trainable=True`."
        )
    others = (p for name, p in model.named_parameters() if not is_channel_parameter(name))
    if isinstance(model, PeftModel) and not any(parameter.requires_grad for parameter in others):
        raise ValueError(
            "The adapter is frozen: load it with `AutoModel.from_pretrained(folder)`, or with "
            "`PeftModel.from_pretrained(base, folder, is_trainable=True)`."
        )


def check_special_tokens(tokenizer: Any, config: RelayConfig) -> None:
    """Raise if a special token of the tokenizer, which the trainer writes into the model, is not in its vocabulary.

    Raises:
        ValueError: an id is outside the model's vocabulary.
    """
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        token_id = getattr(tokenizer, name, None)
        if token_id is not None and token_id >= config.text_config.vocab_size:
            raise ValueError(
                f"The tokenizer's `{name}` is {token_id}, but the model has {config.text_config.vocab_size} tokens: "
                "pass the model's own tokenizer, or call `model.resize_token_embeddings`."
            )
