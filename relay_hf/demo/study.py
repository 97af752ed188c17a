"""The study behind the demo: one masked diffusion model, adapted with each objective, evaluated at five thresholds."""

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase, Qwen2Config, TrainerCallback, set_seed
from transformers.trainer_utils import sort_checkpoints

from ..modeling import RelayConfig, RelayForMaskedDiffusion
from ..tasks.sudoku import (
    SudokuEvaluation,
    SudokuScores,
    augment_puzzles,
    evaluate_sudoku,
    generate_puzzles,
    load_sudoku,
    split_puzzles,
    to_features,
)
from ..trainers import RelayTrainer, RelayTrainerConfig
from ..trainers.interruption import SaveOnInterrupt
from ..trainers.objectives import RECIPES
from .arguments import DemoArguments
from .keeping import KeptStudy

THRESHOLDS = (0.05, 0.15, 0.25, 0.5, 1.0)
DEFAULT_THRESHOLD = THRESHOLDS[0]  # of the saved model: the surest
WARMUP_LEARNING_RATE = 2e-3
ROLLOUT_STEPS = 2


@dataclass(frozen=True)
class Run:
    """One adapted model: which objective, which seed, how it scored at each threshold, how long it trained."""

    objective: str
    seed: int
    evaluations: list[SudokuEvaluation]
    seconds: float


@dataclass(frozen=True)
class Study:
    """Everything the report is made of; `model` is the relay model of the first seed."""

    puzzles: DatasetDict
    tokenizer: PreTrainedTokenizerBase
    runs: list[Run]
    warmup_seconds: float
    model: RelayForMaskedDiffusion


def run_study(
    arguments: DemoArguments, tokenizer: PreTrainedTokenizerBase, puzzles: DatasetDict, kept: KeptStudy
) -> Study:
    """Trains and evaluates; every seed has its own warm start, so that seeds show the whole spread.

    Args:
        arguments: the sizes of the study.
        tokenizer, puzzles: the first `test_puzzles` of the held-out puzzles are solved.
        kept: trainings of an earlier run, which are not repeated.

    Raises:
        KeyboardInterrupt: Ctrl-C; everything so far is kept.
    """
    test = puzzles["test"].select(range(min(arguments.test_puzzles, len(puzzles["test"]))))
    puzzles = DatasetDict(train=puzzles["train"], test=test)
    runs, warmup_seconds, shown = [], 0.0, None
    for seed in range(arguments.seeds):
        set_seed(seed)
        warm = new_model(arguments, tokenizer)
        print(f"\nseed {seed}: {arguments.warmup_steps} `masked` steps from scratch", flush=True)
        train = partial(train_model, tokenizer=tokenizer, puzzles=puzzles["train"], seed=seed, arguments=arguments)
        warmup = partial(train, warm, objective="masked", steps=arguments.warmup_steps, is_warmup=True)
        warmup_seconds += kept.trained(f"seed-{seed}-warmup", warm, warmup)
        for objective in arguments.objectives:
            print(f"\nseed {seed}: {arguments.steps} `{objective}` steps of adaptation", flush=True)
            model, stage = copy.deepcopy(warm), f"seed-{seed}-{objective}"
            seconds = kept.trained(stage, model, partial(train, model, objective=objective, steps=arguments.steps))
            evaluations = kept.evaluated(stage, partial(evaluate, model, tokenizer, puzzles["test"], objective))
            runs.append(Run(objective, seed, [_as_evaluation(fields) for fields in evaluations], seconds))
            if objective == "relay" and shown is None:
                shown = model
    assert shown is not None
    return Study(puzzles, tokenizer, runs, warmup_seconds, shown)


def evaluate(
    model: RelayForMaskedDiffusion, tokenizer: PreTrainedTokenizerBase, puzzles: Dataset, objective: str
) -> list[dict[str, Any]]:
    """At every threshold, as JSON takes it."""
    use_relay = objective.startswith("relay")
    return [asdict(evaluate_sudoku(model, tokenizer, puzzles, t, use_relay=use_relay)) for t in THRESHOLDS]


def _as_evaluation(fields: dict[str, Any]) -> SudokuEvaluation:
    return SudokuEvaluation(**{**fields, "scores": SudokuScores(**fields["scores"])})


def load_puzzles(arguments: DemoArguments) -> DatasetDict:
    """Training and held-out puzzles."""
    wanted = arguments.puzzles + arguments.test_puzzles
    if arguments.dataset is None:
        puzzles = generate_puzzles(wanted, size=arguments.size, seed=0, extra_clues=arguments.extra_clues)
    else:
        puzzles = load_sudoku(arguments.dataset, limit=wanted, size=arguments.size)
    return split_puzzles(puzzles, test_count=arguments.test_puzzles)


def new_model(arguments: DemoArguments, tokenizer: PreTrainedTokenizerBase, **config: Any) -> RelayForMaskedDiffusion:
    """A random model that reads and writes whole boards; `config` has further options of `RelayConfig`."""
    heads = arguments.hidden_size // 32
    text_config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        intermediate_size=4 * arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=arguments.size**2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    mask = tokenizer.mask_token_id
    model = RelayForMaskedDiffusion(RelayConfig(text_config=text_config, block_size=None, mask_token_id=mask, **config))
    model.generation_config.update(unmasking_threshold=DEFAULT_THRESHOLD)
    return model


def trainer_options(objective: str, arguments: DemoArguments, is_warmup: bool = False) -> dict[str, Any]:
    """Options of the trainer that the card names, too; those of rollouts are the published Sudoku recipe's."""
    return {
        "objective": objective,
        "rollout_steps": ROLLOUT_STEPS,
        "learning_rate": WARMUP_LEARNING_RATE if is_warmup else 5e-4,
        # A zero-initialised gate has to open within a few hundred steps.
        "relay_learning_rate": None if RECIPES[objective].carry == "nothing" else 1e-2,
        "unmasking_policy": "confidence_budget",
        "unmasking_threshold": 0.15,
        "threshold_jitter": 0.1,
        "per_device_train_batch_size": arguments.batch_size,
        "ema_decay": 0.99,
    }


def trainer_config(folder: str | Path, steps: int, seed: int, **options: Any) -> RelayTrainerConfig:
    """The configuration of a short training that saves nothing by itself; `options` complete it."""
    return RelayTrainerConfig(
        str(folder),
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.01,
        max_steps=steps,
        seed=seed,
        logging_steps=max(steps // 5, 1),
        save_strategy="no",
        report_to=[],
        gradient_checkpointing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        **options,
    )


def train_model(
    model: RelayForMaskedDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    puzzles: Dataset,
    objective: str,
    seed: int,
    arguments: DemoArguments,
    steps: int,
    *,
    is_warmup: bool = False,
    folder: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    reference_model: RelayForMaskedDiffusion | None = None,
    options: Mapping[str, Any] | None = None,
) -> float:
    """Trains in place and returns the seconds it took.

    Args:
        model, tokenizer: the model to train.
        puzzles: the puzzles to train it on.
        objective: the trainer's objective.
        seed: seed of masks, thresholds and symmetries; warm-up and adaptation see other ones.
        arguments: the sizes of the study.
        steps: optimizer steps.
        is_warmup: train from scratch, at a higher learning rate.
        folder: folder for the checkpoint of an interrupted training, which goes on from it; None = no checkpoint.
        callbacks: callbacks of the trainer.
        reference_model: reference of the objective `residual_context`.
        options: arguments of the trainer instead of the demo's.

    Raises:
        KeyboardInterrupt: Ctrl-C; with a folder, the step in work is finished and a checkpoint is there.
    """
    shown = augment_puzzles(puzzles, rows=steps * arguments.batch_size, seed=2 * seed + is_warmup)
    config = trainer_config(
        folder or arguments.output_dir,  # written to by an interruption only
        steps,
        seed,
        **(trainer_options(objective, arguments, is_warmup) | dict(options or {})),
        # As published, so that the demo stays comparable with the paper.
        rows_on_demand=False,
        staggered_start=False,
        disable_tqdm=False,  # the demo silences the libraries' logs, which would silence their progress bars too
    )
    features = to_features(shown, tokenizer)
    trainer = RelayTrainer(
        model,
        config,
        train_dataset=features,
        processing_class=tokenizer,
        reference_model=reference_model,
        callbacks=list(callbacks),
    )
    if folder is None:
        return trainer.train().metrics["train_runtime"]
    return _train_and_keep(trainer, folder)


def _train_and_keep(trainer: RelayTrainer, folder: Path) -> float:
    """Goes on from the checkpoint in `folder` if there is one; returns all seconds, those before it included."""
    spent = folder / "seconds.txt"
    checkpoints = sort_checkpoints(str(folder)) if folder.exists() else []
    before = float(spent.read_text()) if checkpoints and spent.exists() else 0.0
    with SaveOnInterrupt(trainer) as interruption:
        seconds = before + trainer.train(bool(checkpoints)).metrics["train_runtime"]
    if interruption.checkpoint is not None:
        spent.write_text(str(seconds))
        raise KeyboardInterrupt
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint)
    return seconds
