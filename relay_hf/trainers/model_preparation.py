"""Makes a model ready for training, and keeps it ours while `SFTTrainer` sets itself up."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling import RelayConfig, RelayForMaskedDiffusion
from ..modeling.configuration_relay import check_same_tokens
from ..modeling.loading_adapters_relay import check_adapter, loaded_adapter
from .adapter_targets import check_targets
from .objectives import RECIPES
from .relay_config import RelayTrainerConfig

# PEFT looks up default targets by model type; ours are those of the usual backbones.
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(RelayConfig.model_type, ["q_proj", "v_proj"])


class PreparedModel(NamedTuple):
    """What the trainer needs of a model.

    Args:
        model: what `SFTTrainer` gets: the relay model or the PeftModel around it.
        base: the relay model itself.
        peft_config: of the adapters that `SFTTrainer` is to make, or None.
        reference: the frozen model that supplies the state, or None.
    """

    model: Any
    base: RelayForMaskedDiffusion
    peft_config: PeftConfig | None
    reference: RelayForMaskedDiffusion | None


def prepare_model(
    model: Any,
    args: RelayTrainerConfig,
    peft_config: PeftConfig | None,
    reference: str | PreTrainedModel | None,
) -> PreparedModel:
    """Loads and checks models and adapters; arguments as in `RelayTrainer`. The caller's `peft_config` stays equal.

    Raises:
        ValueError: those of `_with_adapter`, `_relay_model`, `_load_reference` and `check_targets`.
    """
    if isinstance(model, str):
        # TRL resolves a path by `architectures`, which only knows classes inside transformers.
        options: Any = args.model_init_kwargs or {}
        model = RelayForMaskedDiffusion.from_pretrained(model, **{"dtype": "float32", **options})
    model = _with_adapter(model, peft_config)
    base = _relay_model(model, args)
    frozen = _load_reference(reference, args, base)
    check_targets(peft_config, base)
    if peft_config is not None and list(base.relay.parameters()):
        # A channel has a few thousand parameters: adapters would only get in its way.
        modules = sorted({*(peft_config.modules_to_save or []), "relay"})
        peft_config = copy.copy(peft_config)
        peft_config.modules_to_save = modules
    return PreparedModel(model, base, peft_config, frozen)


@contextmanager
def keeps_forward(model: nn.Module) -> Iterator[None]:
    """Inside, `SFTTrainer` puts a `forward` with its own next-token loss onto the model; afterwards ours is back.

    TRL's would never compute our loss, and a copy of the model would share it.
    """
    own = vars(model).get("forward")  # such as that of a hook of accelerate
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        if own is not None:
            model.forward = own


@contextmanager
def hidden(args: RelayTrainerConfig, *names: str) -> Iterator[None]:
    """Inside, these training arguments are None, so that `SFTTrainer` does not act on what we have done or will do."""
    values = {name: getattr(args, name) for name in names}
    vars(args).update(dict.fromkeys(names))
    try:
        yield
    finally:
        vars(args).update(values)


def keep_caches_under_checkpointing(model: nn.Module) -> None:
    """Lets `model` keep the caches of `clean_text.py` when gradient checkpointing replays its layers.

    transformers drops every cache there, unless a layer is known to only read it. The two caches of a rollout can be
    replayed: one is read-only, the other is written once. There is no public switch; `test_denoiser.py` fails if this
    one moves. GPT-2 drops caches before its layers see them, if it is marked itself.
    """
    module: Any
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._can_checkpoint_with_cache = True
        elif hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False  # the layers are what is replayed


class KeepCaches(TrainerCallback):
    """Does so when training begins, because the Trainer switches checkpointing on just before."""

    def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        keep_caches_under_checkpointing(model)


def _with_adapter(model: Any, peft_config: PeftConfig | None) -> Any:
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
    elif isinstance(model, nn.Module) and _is_quantised(model):
        raise ValueError("The model's weights are quantised, and cannot be trained themselves: pass a `peft_config`.")
    return model


def _is_quantised(model: nn.Module) -> bool:
    """Whether some weights are no plain tensors, as those of bitsandbytes and torchao."""
    plain = (nn.Parameter, torch.Tensor, DTensor)
    return any(type(parameter) not in plain or not parameter.is_floating_point() for parameter in model.parameters())


def _relay_model(model: Any, args: RelayTrainerConfig) -> RelayForMaskedDiffusion:
    """The relay model itself, without the PeftModel around it.

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


def _load_reference(
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
