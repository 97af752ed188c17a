"""What `relay-hf train` does once its options are parsed: checks, training, and what is saved."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import get_peft_config, get_quantization_config

from ..conversion.mask_token import choose_mask_token
from ..hub_cards import CARD, set_usage
from ..loading.checkpoint import read_diffusion_config, read_tokenizer
from ..modeling import RelayForMaskedDiffusion
from ..modeling.configuration_relay import RELAY_FIELDS
from ..modeling.loading_adapters_relay import ADAPTER_BASE_FIELD
from ..trainers import RelayTrainer
from ..trainers.card import TRAINING_PICTURE
from ..trainers.interruption import SaveOnInterrupt
from ..trainers.progress import ReadableProgress
from ..trainers.summary import time_two_steps
from .train_arguments import RelayModelConfig, TrainArguments
from .train_data import load_splits, names_for_card
from .train_output import MERGED, check_output, command, leaves_no_empty_folder, remove, resume_command


def train(arguments: TrainArguments, program: str, argv: Sequence[str]) -> None:
    """Runs one training from its first or last step to the saved model.

    Args:
        arguments: the parsed arguments.
        program, argv: the command line, from which the command that resumes is made.

    Raises:
        ValueError: the options do not fit together, or to the model, the data or the output folder.
        OSError: the model or the data cannot be read.
        KeyboardInterrupt: the training was interrupted; its checkpoint is saved.
    """
    with leaves_no_empty_folder(Path(arguments.training.output_dir)):
        _train(arguments, program, argv)


def _train(arguments: TrainArguments, program: str, argv: Sequence[str]) -> None:
    data, training, model, mixture = arguments
    resume = _checkpoint_to_resume(training.resume_from_checkpoint)
    merges = model.use_peft and model.save_merged
    sources = [model.model_name_or_path, model.reference_model]
    replaced = check_output(Path(training.output_dir), resume, model.overwrite_output_dir, merges, sources)
    _check_reports(training.report_to)
    if model.dry_run:
        training.report_to, training.push_to_hub = [], False
    train_set, eval_set = load_splits(data, mixture, training)
    options = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **model.relay_options(),
    }
    options |= _more_options(training.model_init_kwargs or {}, options)
    tokenizer = _read_tokenizer(model, options)
    if model.quantises:
        options["quantization_config"] = get_quantization_config(model)
    training.model_init_kwargs = options
    trainer = RelayTrainer(
        model.model_name_or_path,
        training,
        reference_model=model.reference_model,
        peft_config=get_peft_config(model),
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
    )
    if merges and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError("`save_merged=True` needs whole weights, but they are sharded: set it to false, merge later.")
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    say = trainer.accelerator.print  # by the first process only
    say(f"relay-hf: what {'would be' if model.dry_run else 'is'} trained\n{trainer.summary()}", flush=True)
    if model.dry_run:
        say(time_two_steps(trainer))
        say("relay-hf: nothing is written, because of `dry_run`")
        return
    if trainer.is_world_process_zero():
        remove(replaced)
    trainer.add_callback(ReadableProgress())
    with SaveOnInterrupt(trainer) as interruption:
        trainer.train(resume_from_checkpoint=resume)
    if interruption.checkpoint is not None:
        how = f"this goes on from there:\n{resume_command(program, argv, interruption.checkpoint)}"
        if training.world_size > 1:
            how = f"to go on, launch it as before with `--resume_from_checkpoint {interruption.checkpoint}`"
        say(f"relay-hf: step {trainer.state.global_step} of {trainer.state.max_steps} is saved; {how}", flush=True)
        raise KeyboardInterrupt
    trainer.save_model()
    names = names_for_card(data, mixture)
    trainer.create_model_card(dataset_name=names)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=names)
    result = training.output_dir
    if merges and trainer.is_world_process_zero():
        result = _save_merged(trainer, _whole_model(trainer, model.model_name_or_path), tokenizer)
    generate = command("relay-hf generate", str(result), _a_prompt(train_set))
    say(f"relay-hf: the model is in `{result}`; try it:\n{generate}")


def _whole_model(trainer: RelayTrainer, source: str) -> Any:
    """The model that the trained adapter is merged into: of quantised weights, which cannot take it, the source."""
    given: Any = trainer.args.model_init_kwargs
    options = dict(given)
    if options.pop("quantization_config", None) is None:
        return trainer.accelerator.unwrap_model(trainer.model)
    whole = RelayForMaskedDiffusion.from_pretrained(source, **options)
    whole.load_adapter(trainer.args.output_dir)
    return whole


def _save_merged(trainer: RelayTrainer, whole: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """The whole model in a folder of its own: adapters alone are of no use without what they started from."""
    output = Path(trainer.args.output_dir)
    folder = output / MERGED
    whole.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in (CARD, TRAINING_PICTURE):
        if (file := output / name).exists():
            shutil.copyfile(file, folder / name)
    set_usage(folder, str(folder.resolve()), "")
    return str(folder)


def _a_prompt(rows: Any) -> str:
    """The beginning of the training text's first row, as something to try the model with."""
    row: dict[str, Any] = next(iter(rows), {})
    text = next((row[name] for name in ("prompt", "messages", "text") if row.get(name)), "Hello")
    if not isinstance(text, str):
        text = next((turn["content"] for turn in text if turn.get("role") == "user"), "Hello")
    line = next((line for line in text.splitlines() if line.strip()), "Hello")
    return line.strip("- ")[:80].rstrip()


def _checkpoint_to_resume(given: str | bool | None) -> str | bool | None:
    """The folder unchanged; the text "true" becomes True, which means the last checkpoint of the output."""
    named = {"true": True, "false": None}.get(str(given).lower(), given)
    if isinstance(named, str) and not Path(named).is_dir():
        raise ValueError(
            f"`resume_from_checkpoint={named}` is no folder: give one, or `true` for the last of `output_dir`."
        )
    return named


def _check_reports(names: Any) -> None:
    """transformers would only notice a missing package after everything has been loaded."""
    if missing := sorted(set(names) & INTEGRATION_TO_CALLBACK.keys() - {*get_available_reporting_integrations()}):
        raise ValueError(
            f"`report_to={missing[0]}` needs a package that is not installed: install it, or leave it out."
        )


def _more_options(given: Any, known: dict[str, Any]) -> dict[str, Any]:
    """`model_init_kwargs`, which may also name what other options set."""
    if not isinstance(given, dict):
        raise ValueError(
            f"`model_init_kwargs={given}` has no names: write `{{relay_readout: pre_norm}}`, for instance."
        )
    if unknown := sorted(given.keys() - RELAY_FIELDS - known.keys()):
        raise ValueError(f"`model_init_kwargs` does not take {unknown}: give arguments of `RelayConfig`.")
    return given


def _read_tokenizer(model: RelayModelConfig, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The model's tokenizer with its [MASK] token set; checks configuration and tokenizer before reading any weight."""
    source, revision = str(model.model_name_or_path), model.model_revision
    fields = {name: value for name, value in options.items() if name in RELAY_FIELDS}
    config = read_diffusion_config(source, revision, **fields)
    if model.quantises and not (model.use_peft or hasattr(config, ADAPTER_BASE_FIELD)):
        raise ValueError(
            f"`{model.quantises}` freezes the model's weights, so that only adapters can learn: add `--use_peft true`."
        )
    tokenizer = read_tokenizer(source, config, revision)
    choose_mask_token(config.mask_token_id, None, tokenizer, config.text_config.vocab_size)
    return tokenizer
