"""The training data of the published recipe, from OpenCodeInstruct and OpenMathInstruct-2.

1. stream both data sets in a seeded order; 2. leave out what `mixture_filters` names, prompts that came before, and
conversations that are too long for the model; 3. mix, and write JSON lines with a conversational `prompt` and
`completion`. The same arguments give the same file.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import load_dataset
from huggingface_hub.utils import tqdm

from ..loading.checkpoint import read_config, read_tokenizer
from ..startup.whole_file import write_whole
from .mixture_filters import CODE, MATH, Source, prompt_key

if TYPE_CHECKING:
    from .prepare_data import PrepareArguments


def prepare_data(output: str | Path, arguments: "PrepareArguments") -> dict[str, Counter[str]]:
    """Writes the rows, in an order that mixes both data sets.

    Args:
        output: file to write; must not exist.
        arguments: the data sets, and the rows to keep.

    Returns:
        For `code` and `math`: the rows `read` and `kept`, and how many each filter left out.

    Raises:
        FileExistsError: `output` exists.
        OSError: a data set or the tokenizer cannot be read.
        ValueError: a data set lacks a column or has too few good rows, or there is no chat template.
    """
    target = Path(output)
    if target.exists():
        raise FileExistsError(f"`{target}` exists already: choose another output, or remove it.")
    tokenizer: Any = read_tokenizer(arguments.model, read_config(arguments.model))
    if tokenizer.chat_template is None:
        raise ValueError(f"`{arguments.model}` has no chat template to measure conversations with: give another one.")
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    counts: dict[str, Counter[str]] = {}
    for index, (name, source) in enumerate({"code": CODE, "math": MATH}.items()):
        path, split, wanted, buffer = (
            getattr(arguments, f"{name}{part}") for part in ("", "_split", "_rows", "_buffer")
        )
        if wanted == 0:
            counts[name] = Counter(read=0, kept=0)
            continue
        stream = _open(path, split, source).shuffle(seed=arguments.seed + index, buffer_size=buffer)
        kept, counts[name] = _collect(stream, name, source, wanted, tokenizer, arguments.max_tokens, seen)
        if len(kept) < wanted:
            raise ValueError(
                f"`{path}` has {len(kept)} rows that can be kept, but {wanted} are wanted "
                f"({summarize_counts(counts[name])}): set `--{name}_rows={len(kept)}`, or give more data."
            )
        rows += kept
    random.Random(arguments.seed).shuffle(rows)
    write_whole(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return counts


def _open(path: str, split: str, source: Source) -> Any:
    """A stream of the columns that are read."""
    is_file = path.endswith((".json", ".jsonl"))
    if is_file and not Path(path).is_file():
        raise FileNotFoundError(f"`{path}` does not exist: check the path, or give a data set of the Hub.")
    where: dict[str, Any] = {"path": "json", "data_files": path} if is_file else {"path": path}
    columns = [source.prompt, source.answer, *source.others]
    try:
        stream = load_dataset(**where, split="train" if is_file else split, streaming=True)
        first = next(iter(stream))
    except StopIteration:
        first = {}
    if missing := sorted(set(columns) - set(first)):
        raise ValueError(f"`{path}` has no rows with {missing}: give a data set with the columns {columns}.")
    return stream.select_columns(columns)


def _collect(
    stream: Any, name: str, source: Source, wanted: int, tokenizer: Any, max_tokens: int, seen: set[str]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The first good rows of a stream, and what happened to the others; `seen` grows by their prompts."""
    kept: list[dict[str, Any]] = []
    counts = Counter(read=0, kept=0)
    with tqdm(total=wanted, desc=name, unit="row") as progress:
        rows = iter(stream)
        while len(kept) < wanted and (row := next(rows, None)) is not None:
            counts["read"] += 1
            prompt, answer, reason = source.read(row)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            if reason is None and (key := prompt_key(prompt)) in seen:
                reason = "prompt seen before"
            if reason is None and len(tokenizer.apply_chat_template(messages)["input_ids"]) > max_tokens:
                reason = "too many tokens"
            if reason is not None:
                counts[reason] += 1
                continue
            seen.add(key)
            kept.append({"prompt": messages[:1], "completion": messages[1:], "source": name})
            counts["kept"] += 1
            progress.update()
    return kept, counts


def summarize_counts(counts: Counter[str]) -> str:
    """The rows of a data set that were read, kept and left out, in words."""
    reasons = [f"{count} {reason}" for reason, count in counts.items() if reason not in ("read", "kept")]
    return f"{counts['read']} read, {counts['kept']} kept; left out: {', '.join(reasons) or 'none'}"
