"""Texts that the model writes at each evaluation, and the forwards they take."""

import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from .relay_config import RelayTrainerConfig

KINDS = ("denoise", "commit", "prefill")
SPEED = "sample_tokens_per_denoise_forward"  # in the metrics of an evaluation, behind its prefix


class Sample(NamedTuple):
    """One text.

    Args:
        prompt: tokens before the first learned one of a row.
        tokens: what the model wrote behind it, as many as the row has.
        forwards: number of forwards by kind.
    """

    prompt: list[int]
    tokens: list[int]
    forwards: dict[str, int]


@torch.no_grad()
def write_samples(model: Any, dataset: Any, args: RelayTrainerConfig) -> Iterator[Sample]:
    """Continues the prompts of the first `args.sample_rows` rows, decoding as the rollouts of training reveal.

    Args:
        model: a relay model, possibly with PEFT around it.
        dataset: with `input_ids` and `labels`; rows without a prompt are passed over.
        args: names the unmasking policy.
    """
    options = {
        "unmasking_policy": args.unmasking_policy,
        "unmasking_threshold": args.unmasking_threshold,
        **({"sub_block_size": args.sub_block_size} if args.sub_block_size is not None else {}),
    }
    was_training = model.training
    model.eval()
    for row in islice(iter(dataset), args.sample_rows):
        ids, labels = list(row["input_ids"]), list(row["labels"])
        begin = next(place for place, label in enumerate(labels) if label != -100)
        if begin == 0:
            continue
        prompt = torch.tensor([ids[:begin]], device=args.device)
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(ids) - begin,
            do_sample=False,
            return_dict_in_generate=True,
            **options,
        )
        forwards = {kind: int(getattr(output, f"{kind}_forwards")[0]) for kind in KINDS}
        yield Sample(ids[:begin], output.sequences[0, begin:].tolist(), forwards)
    model.train(was_training)


def describe_sample(sample: Sample, tokenizer: Any) -> str:
    """Two lines: the end of the prompt and the text, and what it took."""
    prompt, text = (tokenizer.decode(tokens) for tokens in (sample.prompt, sample.tokens))
    counts = ", ".join(f"{count} {kind}" for kind, count in sample.forwards.items())
    return f"  sample {prompt[-60:]!r} -> {text!r}\n         {counts} forwards for {len(sample.tokens)} tokens"


def show_samples(trainer: Any, dataset: Any, prefix: str) -> None:
    """Prints what the model writes, and notes it in the trainer's log and evaluation metrics.

    Args:
        trainer: a `RelayTrainer`.
        dataset: one evaluation set or its name; of several, each comes here by itself.
        prefix: of the evaluation's metrics.
    """
    if isinstance(dataset, str):
        dataset = trainer.eval_dataset[dataset]
    is_prepared = {"input_ids", "labels"} <= set(getattr(dataset, "column_names", None) or ())
    if not trainer.args.sample_rows or not is_prepared or not trainer.is_world_process_zero():
        return
    with trainer.accelerator.autocast():
        samples = list(write_samples(trainer.accelerator.unwrap_model(trainer.model), dataset, trainer.args))
    tokenizer: Any = trainer.processing_class
    note: dict[str, Any] = {f"{prefix}_samples": [tokenizer.decode(sample.tokens) for sample in samples]}
    trainer.state.log_history.append({**note, "step": trainer.state.global_step})
    for sample in samples:
        trainer.eval_means.add_sum(SPEED, len(sample.tokens), sample.forwards["denoise"])
        trainer.eval_means.add({f"sample_{kind}_forwards": count for kind, count in sample.forwards.items()})
        tqdm.write(describe_sample(sample, tokenizer), file=sys.stdout)
