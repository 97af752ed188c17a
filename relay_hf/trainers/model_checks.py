"""Refuses models and arguments that cannot be trained, before work starts."""

from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..modeling import RelayConfig, RelayForMaskedDiffusion
from ..modeling.adapter_relay import check_adapter, loaded_adapter
from ..modeling.configuration_relay import check_same_tokens
from .metrics import is_channel_parameter
from .objectives import RECIPES
from .relay_config import RelayTrainerConfig


def check_arguments(args: Any, others: dict[str, Any]) -> None:
    """Refuses arguments of `SFTTrainer` that have no meaning for a relay model.

    Args:
        args: the training arguments.
        others: the trainer's other keyword arguments.

    Raises:
        ValueError: there is one.
    """
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        if others.get(name) is not None:
            raise ValueError(f"`{name}` is not supported: a rollout has no single set of logits; leave it out.")
    if not isinstance(args, RelayTrainerConfig):
        raise ValueError(f"`args` is a {type(args).__name__}, which names no objective: pass a RelayTrainerConfig.")
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


def with_adapter(model: Any, peft_config: PeftConfig | None) -> Any:
    """What the trainer trains: of a model on which an adapter was loaded, the PeftModel around it.

    Args:
        model: a relay model or a PeftModel of one.
        peft_config: of adapters that are to be made.

    Raises:
        ValueError: a kind of adapter cannot work here, there would be two, or the weights are quantised and there is
            none.
    """
    adapter = loaded_adapter(model) if isinstance(model, RelayForMaskedDiffusion) else None
    if adapter is not None:
        model = adapter
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError(
                "The model has an adapter, and `peft_config` asks for another: leave out `peft_config` to go on with "
                "the first, or merge it by `merge_and_unload`."
            )
        for config in model.peft_config.values():
            check_adapter(config)
    elif peft_config is not None:
        check_adapter(peft_config)
    elif isinstance(model, nn.Module) and is_quantised(model):
        raise ValueError("The model's weights are quantised, and cannot be trained themselves: pass a `peft_config`.")
    return model


def is_quantised(model: nn.Module) -> bool:
    """Whether some weights are no plain tensors, as those of bitsandbytes and torchao."""
    plain = (nn.Parameter, torch.Tensor, DTensor)
    return any(type(parameter) not in plain or not parameter.is_floating_point() for parameter in model.parameters())


def channel_weights(base: RelayForMaskedDiffusion) -> dict[str, torch.Tensor]:
    """A copy of the channel's parameters, of those that PEFT trains where it keeps two sets, for the following one."""
    return {name: parameter.detach().clone() for name, parameter in _trained_channel(base).named_parameters()}


def keep_channel_precise(base: RelayForMaskedDiffusion, weights: dict[str, torch.Tensor]) -> None:
    """Puts the channel into fp32: anything coarser would lose its small updates.

    `model.to(torch.bfloat16)` takes it along, and SFTTrainer puts all that is trained on quantised weights into bf16.

    Args:
        base: the model, prepared for training.
        weights: the channel before that.
    """
    if any(parameter.dtype != torch.float32 for parameter in base.relay.parameters()):
        base.relay.float()
        with torch.no_grad():
            for name, parameter in _trained_channel(base).named_parameters():
                parameter.copy_(weights[name])


def _trained_channel(base: RelayForMaskedDiffusion) -> nn.Module:
    channel: Any = base.relay
    if isinstance(channel, ModulesToSaveWrapper) and channel.active_adapters:
        return channel.modules_to_save[channel.active_adapters[0]]
    return channel


def check_learning(model: nn.Module, args: RelayTrainerConfig) -> None:
    """Called when all is prepared.

    Raises:
        ValueError: what the objective trains is frozen.
    """
    channel = [p for name, p in model.named_parameters() if is_channel_parameter(name)]  # none for a residual context
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


def relay_model(model: Any, args: RelayTrainerConfig) -> RelayForMaskedDiffusion:
    """The relay model itself, without PEFT around it.

    Raises:
        ValueError: it is not of this library, or its channel lacks what the objective needs.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, RelayForMaskedDiffusion):
        raise ValueError(
            f"`model` is a {type(base).__name__}, which has no relay channel: make a relay model of it with "
            "`relay_hf.convert(source, output)`, and load that with `RelayForMaskedDiffusion.from_pretrained(output)`."
        )
    args.recipe.check_channel(args.objective, base.config.relay_channel)
    return base


def load_reference(
    reference: str | PreTrainedModel | None, args: RelayTrainerConfig, base: RelayForMaskedDiffusion
) -> RelayForMaskedDiffusion | None:
    """The reference model of residual context training, in evaluation mode; None if there is none.

    Args:
        reference: the model, possibly with PEFT around it, or where to load it from.
        args: the training arguments.
        base: the model to be trained.

    Raises:
        ValueError: the objective has no use for it, it is no relay model, it is the trained model itself, or it does
            not read and predict the same tokens in the same blocks.
    """
    if reference is None:
        return None
    if args.recipe.carry != "prediction":
        fitting = [name for name, recipe in RECIPES.items() if recipe.carry == "prediction"]
        raise ValueError(
            f"`reference_model` has no effect with `objective={args.objective!r}`: leave it out, or choose one of the "
            f"objectives {fitting}."
        )
    if isinstance(reference, str):
        reference = RelayForMaskedDiffusion.from_pretrained(reference)
    model = reference.get_base_model() if isinstance(reference, PeftModel) else reference
    if model is base:
        raise ValueError(
            "`reference_model` is the trained model itself, which would not stay frozen: leave it out to use the "
            "model's own predictions, or pass a copy."
        )
    check_same_tokens(base.config, model)
    return model.eval()


def check_special_tokens(tokenizer: Any, config: RelayConfig) -> None:
    """The trainer writes the tokenizer's ids into the model, which could then be saved but not loaded.

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
