"""What `relay-hf traces` does once its options are parsed: decoding, checks, and a file that is written whole."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from trl import ScriptArguments

from ..evaluation.forwards import FORWARDS
from ..loading.checkpoint import load_for_decoding
from ..traces import TASKS, Task, Trace, decode_traces
from .decoding_arguments import DecodingArguments
from .train_data import load_rows
from .unfinished import UnfinishedFile

if TYPE_CHECKING:
    from .traces import TracesArguments


def write_traces(source: str, output: str, arguments: "TracesArguments", raw: bool) -> str:
    """Answers every prompt, and writes the texts that are right. The same command goes on where an earlier one ended.

    Args:
        source: folder or Hub id of the model.
        output: file to write; must not exist.
        arguments: prompts, check and decoding.
        raw: give prompts without the chat template.

    Returns:
        What was kept, and what it cost, for the terminal.

    Raises:
        OSError: the output exists, or model or data cannot be read.
        ValueError: an option does not fit the model, a row cannot be asked, or no text is right.
    """
    unfinished = UnfinishedFile(Path(output), {"model": source, "raw": raw, **asdict(arguments), "device": ""})
    rows, size = _rows(arguments), arguments.batch_size
    model, tokenizer = load_for_decoding(
        source, arguments.revision, arguments.device, arguments.dtype, arguments.options
    )
    task = TASKS[arguments.check](tokenizer, model.config, arguments.prompt_column, arguments.answer_column, raw)
    prompts = [_prompt(task, row, number) for number, row in enumerate(rows)]
    options = arguments.options(model.generation_config)
    if model.config.block_size is not None:
        options.setdefault("max_new_tokens", DecodingArguments.max_new_tokens)
    records = unfinished.resume(size)
    with tqdm(total=len(rows), initial=len(records), unit="text", desc="traces") as bar:
        for begin in range(len(records), len(rows), size):
            batch = slice(begin, begin + size)
            if arguments.seed is not None:  # of its own for each row, whatever the batch
                options["sampling_seeds"] = [arguments.seed + number for number in range(len(rows))[batch]]
            traces = decode_traces(model, prompts[batch], options)
            answered = _records(begin, traces, task.are_right(rows[batch], traces))
            unfinished.append(answered)
            records += answered
            bar.update(len(answered))
    kept = [record for record in records if "input_ids" in record]
    if not kept:
        raise ValueError(
            f"None of {len(records)} texts is right by `--check={arguments.check}`, so that `{output}` is not written: "
            "take a surer threshold, or other prompts."
        )
    unfinished.finish(kept)
    return f"{_summary(records)}\n{_summary(kept, 'kept: ')}\n{output}: train on it with `--objective traces`"


def _rows(arguments: "TracesArguments") -> list[dict[str, Any]]:
    data = ScriptArguments(dataset_name=str(arguments.dataset_name), dataset_config=arguments.dataset_config)
    rows = load_rows(data, arguments.dataset_split)
    return list(rows.select(range(min(arguments.limit or len(rows), len(rows)))))


def _prompt(task: Task, row: dict[str, Any], number: int) -> list[int]:
    try:
        return task.prompt(row)
    except ValueError as error:
        raise ValueError(f"Row {number} of the data set cannot be asked. {error}") from error


def _records(begin: int, traces: Sequence[Trace], right: Sequence[bool]) -> list[dict[str, Any]]:
    """The costs of all texts, and the tokens of those that are right."""
    records = []
    for number, (trace, is_right) in enumerate(zip(traces, right, strict=True), begin):
        columns = asdict(trace)
        costs = {"row": number, **columns.pop("costs")}
        records.append({**(columns if is_right else {}), **costs})
    return records


def _summary(records: Sequence[dict[str, Any]], title: str = "") -> str:
    count = len(records)
    tokens, denoise = (sum(record[name] for record in records) for name in ("new_tokens", "denoise_forwards"))
    forwards = sum(record[name] for record in records for name in FORWARDS)
    return (
        f"{title}{count} texts, each of {tokens / count:.1f} tokens in {denoise / count:.1f} denoise forwards: "
        f"{tokens / max(denoise, 1):.2f} tokens per denoise forward, {tokens / max(forwards, 1):.2f} per forward of "
        "any kind"
    )
