"""Every private name of other libraries that this one uses, each with a check that fails when the name moves.

Private is what begins with an underscore: an attribute that is read or set on an object of a library, a keyword, an
imported name, or what a class of ours overrides in a class of a library. So is a module deep inside a library of
Hugging Face. The lists below are compared with the source of the package: a new use needs an entry, an entry a use.
"""

import argparse
import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, Qwen2Config, Trainer
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file

import relay_hf

from .modeling import test_generation_contract
from .serving import test_contract

PACKAGE = Path(relay_hf.__file__).parent
HUGGING_FACE = {"accelerate", "datasets", "huggingface_hub", "lm_eval", "peft", "transformers", "trl"}
LIBRARIES = HUGGING_FACE | {"argparse", "fastapi", "starlette", "torch"}
# Of the standard library, where they are documented.
DOCUMENTED = {"_exit", "_fields", "_replace"}
# Made by Python and torch for every subclass.
AUTOMATIC = {"_abc_impl", "_backward_cls"}


def parser_actions() -> None:
    parser = argparse.ArgumentParser()
    assert parser.add_argument("--option") in parser._actions


def layers_may_keep_caches() -> None:
    assert GradientCheckpointingLayer._can_checkpoint_with_cache is False
    assert "self._can_checkpoint_with_cache" in inspect.getsource(GradientCheckpointingLayer)


def special_tokens_as_tensors() -> None:
    options = GenerationConfig(eos_token_id=5, pad_token_id=3, bos_token_id=1)
    GenerationMixin._prepare_special_tokens(SimpleNamespace(config=Qwen2Config()), options, True, device="cpu")
    assert options._eos_token_tensor.tolist() == [5]


def forward_hooks() -> None:
    layer = torch.nn.Linear(1, 1)
    layer.register_forward_hook(print)
    assert len(layer._forward_hooks) == 1


def config_made_of_a_model() -> None:
    options = GenerationConfig.from_model_config(Qwen2Config())
    assert options._from_model_config is True
    # A configuration of a model keeps no fields of ours when it is read back; one of `generate` does.
    for is_of_model in (True, False):
        read, _ = GenerationConfig.from_dict(
            {"unmasking_policy": "own"}, return_unused_kwargs=True, _from_model_config=is_of_model
        )
        assert hasattr(read, "unmasking_policy") is not is_of_model


def attention_of_a_configuration() -> None:
    config = Qwen2Config(attn_implementation="eager")
    assert config._attn_implementation == "eager"
    config._attn_implementation = "sdpa"
    assert config._attn_implementation == "sdpa"


def fixed_addresses() -> None:
    tensor = torch.zeros(1)
    torch._dynamo.mark_static_address(tensor)
    assert tensor._dynamo_static_input_type == "unguarded"


def missing_files_are_none() -> None:
    assert cached_file(str(PACKAGE), "no such file", _raise_exceptions_for_missing_entries=False) is None


def read_by(*owners: type, name: str) -> Callable[[], None]:
    """A check that the library itself reads, calls or takes the name in one of these classes."""

    def check() -> None:
        assert any(name in inspect.getsource(owner) for owner in owners)

    return check


# Attributes, keywords and imported names, and what shows that each still means what it meant.
CHECKS: dict[str, Callable[[], None]] = {
    "_StreamError": test_contract.test_streams_report_failures_as_items_of_their_queue,
    "_actions": parser_actions,
    "_attn_implementation": attention_of_a_configuration,
    "_can_checkpoint_with_cache": layers_may_keep_caches,
    "_dynamo": fixed_addresses,
    "_eos_token_tensor": special_tokens_as_tensors,
    "_finish_current_push": read_by(Trainer, name="self._finish_current_push("),
    "_forward_hooks": forward_hooks,
    "_from_model_config": config_made_of_a_model,
    "_get_default_generation_params": read_by(GenerationMixin, name="update(**global_defaults, defaults_only=True)"),
    "_get_logits_processor": read_by(GenerationMixin, name="self._get_logits_processor("),
    "_get_output_dir": read_by(Trainer, name="self._get_output_dir(trial=trial)"),
    "_get_train_sampler": read_by(Trainer, name="sampler_fn=self._get_train_sampler"),
    "_internal_call": read_by(Trainer, name="def save_model(self, output_dir: str | None = None, _internal_call: bool"),
    "_raise_exceptions_for_missing_entries": missing_files_are_none,
    "_resolve_model": read_by(ChatCompletionHandler, name="self._resolve_model(body)"),
    "_train_batch_size": read_by(Trainer, name="self._train_batch_size = args.train_batch_size"),
    "_valid_auto_compile_criteria": read_by(GenerationMixin, name="if self._valid_auto_compile_criteria(model_kwargs"),
}

# Class of a library -> what ours override there; the library must go on using it.
OVERRIDDEN = {
    "argparse.HelpFormatter": {"_format_action_invocation"},
    "lm_eval.models.huggingface.HFLM": {"_get_config", "_loglikelihood_tokens", "_model_generate"},
    "transformers.cli.serving.model_manager.ModelManager": {"_load_model", "_load_processor"},
    "transformers.cli.serving.utils.BaseHandler": {"_build_generation_config"},
    "transformers.generation.utils.GenerationMixin": set(test_generation_contract.OVERRIDDEN),
    "transformers.modeling_utils.PreTrainedModel": {
        "_adjust_missing_and_unexpected_keys",
        "_init_weights",
        "_keep_in_fp32_modules_strict",
        "_keys_to_ignore_on_load_missing",
        "_skip_keys_device_placement",
        "_supports_attention_backend",
        "_supports_flex_attn",
        "_supports_sdpa",
        "_tied_weights_keys",
    },
    "transformers.trainer.Trainer": {
        "_get_grad_norm",
        "_init_training_state",
        "_load_best_model",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_prepare_inputs",
    },
    "trl.trainer.base_trainer._BaseTrainer": {"_paper"},
    "trl.trainer.sft_trainer.SFTTrainer": {"_name", "_prepare_dataset", "_save_checkpoint", "_tag_names"},
}

# Imported from modules that are no documented place of it.
DEEP_IMPORTS = {
    "datasets.utils.logging.disable_progress_bar",
    "lm_eval.api.instance.Instance",
    "lm_eval.api.registry.register_model",
    "lm_eval.models.huggingface.HFLM",
    "peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "transformers.cli.serving.chat_completion.ChatCompletionHandler",
    "transformers.cli.serving.completion.CompletionHandler",
    "transformers.cli.serving.model_manager.ModelManager",
    "transformers.cli.serving.response.ResponseHandler",
    "transformers.cli.serving.server.build_server",
    "transformers.cli.serving.utils.BaseHandler",
    "transformers.cli.serving.utils.DirectStreamer",
    "transformers.cli.serving.utils.GenerateManager",
    "transformers.cli.serving.utils.GenerationState",
    "transformers.cli.serving.utils._StreamError",
    "transformers.cli.serving.utils.split_revision",
    "transformers.generation.streamers.BaseStreamer",
    "transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK",
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "transformers.models.auto.tokenization_auto.get_tokenizer_config",
    "transformers.utils.deprecation.deprecate_kwarg",
    "transformers.utils.generic.can_return_tuple",
    "transformers.utils.import_utils.is_serve_available",
    "trl.scripts.utils.DatasetConfig",
}


@cache
def nodes() -> list[ast.AST]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))]
    return [node for tree in trees for node in ast.walk(tree)]


def is_private(name: str | None) -> bool:
    return bool(name) and name.startswith("_") and not name.startswith("__")


def own_names() -> Iterator[str]:
    """What the package defines itself: functions, classes, variables, and attributes of `self`."""
    for node in nodes():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def library_imports() -> Iterator[tuple[str, str]]:
    for node in nodes():
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in LIBRARIES:
            yield from ((node.module, alias.name) for alias in node.names)


def used_names() -> set[str]:
    named = {node.attr if isinstance(node, ast.Attribute) else node.arg
             for node in nodes() if isinstance(node, ast.Attribute | ast.keyword)}  # fmt: skip
    named |= {name for _, name in library_imports()}
    return {name for name in named if is_private(name)} - set(own_names()) - DOCUMENTED


def own_classes() -> Iterator[type]:
    for module in pkgutil.walk_packages([str(PACKAGE)], "relay_hf."):
        # The one would run the command line, the other needs vLLM: tests/vllm/test_contract.py has its names.
        if not module.name.endswith("__main__") and not module.name.startswith("relay_hf.vllm."):
            classes = vars(importlib.import_module(module.name)).values()
            yield from (c for c in classes if inspect.isclass(c) and c.__module__ == module.name)


def test_private_names_that_are_used_are_those_checked() -> None:
    assert used_names() == CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_private_name_means_what_it_meant(name: str) -> None:
    CHECKS[name]()


def test_overridden_private_names_are_those_listed() -> None:
    found: dict[str, set[str]] = {}
    for own in own_classes():
        for name in filter(is_private, vars(own)):
            owners = [c for c in own.__mro__[1:] if c.__module__.split(".")[0] in LIBRARIES and name in vars(c)]
            if owners and name not in AUTOMATIC:
                found.setdefault(f"{owners[0].__module__}.{owners[0].__name__}", set()).add(name)
    assert found == OVERRIDDEN


@pytest.mark.parametrize(("owner", "name"), [(o, name) for o, names in OVERRIDDEN.items() for name in sorted(names)])
def test_overridden_private_name_is_used_by_its_library(owner: str, name: str) -> None:
    module, _, own = owner.rpartition(".")
    # Called by a subclass of the library, in places, or by a function beside it.
    others = [
        PreTrainedModel.from_pretrained.__module__,
        "transformers.core_model_loading",
        "transformers.integrations",
    ]
    sources = [inspect.getsource(c) for c in getattr(importlib.import_module(module), own).__mro__[:-1]]
    sources += [inspect.getsource(importlib.import_module(module)), *map(source_of_module, others)]
    sources.append(inspect.getsource(Trainer))
    assert any(f".{name}" in source or f'"{name}"' in source for source in sources)


def source_of_module(name: str) -> str:
    return inspect.getsource(importlib.import_module(name))


def test_imports_from_deep_modules_are_those_listed() -> None:
    deep = {(module, name) for module, name in library_imports() if module.count(".") >= 2}
    assert {f"{m}.{name}" for m, name in deep if m.split(".")[0] in HUGGING_FACE} == DEEP_IMPORTS


@pytest.mark.parametrize("name", sorted(DEEP_IMPORTS))
def test_deep_import_is_there(name: str) -> None:
    module, _, member = name.rpartition(".")
    assert hasattr(importlib.import_module(module), member)
