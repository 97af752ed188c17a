"""Does a model that learns from its own traces solve Sudoku in fewer forwards?

    python benchmarks/traces.py [--seeds 0 1 2] [--threshold 0.02] [--strides 2 3]

Each seed trains the demo's model from scratch, adapts it with `relay`, and lets that model, the start, solve training
puzzles with a sure threshold. From the start, the same number of optimizer steps is then trained on more puzzles with
`relay` ("plain"), and on the start's own legal solutions with `traces`. All are evaluated on held-out puzzles. What the
output folder holds already is not trained again.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import set_seed
from transformers.utils import logging

from relay_hf import RelayForMaskedDiffusion, RelayTrainer, RelayTrainerConfig
from relay_hf.demo.arguments import DemoArguments
from relay_hf.demo.study import load_puzzles, new_model, train_model, trainer_options
from relay_hf.tasks.sudoku import augment_puzzles, evaluate_sudoku, make_sudoku_tokenizer
from relay_hf.traces import TASKS, Trace, decode_traces

THRESHOLDS = (0.02, 0.05, 0.15, 0.25, 0.5, 1.0)
TRACE_BATCH = 250

Evaluations = list[dict[str, Any]]  # one per threshold


class SeedStudy:
    """Everything that is trained and evaluated with one seed; models and results are kept in a folder.

    Args:
        seed: of all randomness.
        options: the command line.
        arguments: the demo's, of those sizes.
        puzzles: training and held-out puzzles, the same for all seeds.
        folder: where results and models are kept.
    """

    def __init__(
        self, seed: int, options: argparse.Namespace, arguments: DemoArguments, puzzles: DatasetDict, folder: Path
    ) -> None:
        self.seed, self.options, self.arguments, self.puzzles, self.folder = seed, options, arguments, puzzles, folder
        self.tokenizer = make_sudoku_tokenizer(options.size)
        self.path = folder / f"seed_{seed}.json"
        self.results: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self) -> None:
        """Trains and evaluates what is missing."""
        start = self._trained("start", self._from_scratch)
        texts = self._traces(start)
        self._trained("plain", lambda: self._plain(copy.deepcopy(start)))
        for stride in self.options.strides:
            train = partial(self._on_traces, copy.deepcopy(start), texts, stride)
            self._trained(f"traces, stride {stride}", train)

    def _trained(self, name: str, train: Callable[[], RelayForMaskedDiffusion]) -> RelayForMaskedDiffusion:
        """The model of that name, evaluated; trained unless the folder holds it."""
        kept = self.folder / f"seed_{self.seed}_{name}"
        if name not in self.results:
            set_seed(self.seed)
            begin = time.perf_counter()
            model = train()
            seconds = time.perf_counter() - begin
            model.save_pretrained(kept)
            self.results[name] = {"seconds": seconds, "evaluations": self._evaluate(model)}
            self.path.write_text(json.dumps(self.results), encoding="utf-8")
            print(f"seed {self.seed}: {name}, {seconds:.0f} s\n{curve(self.results[name]['evaluations'])}", flush=True)
        return RelayForMaskedDiffusion.from_pretrained(kept)

    def _evaluate(self, model: RelayForMaskedDiffusion) -> Evaluations:
        test = self.puzzles["test"].select(range(self.options.test_puzzles))
        return [asdict(evaluate_sudoku(model, self.tokenizer, test, t, progress=False)) for t in THRESHOLDS]

    def _from_scratch(self) -> RelayForMaskedDiffusion:
        model, data, sizes = new_model(self.arguments, self.tokenizer), self.puzzles["train"], self.arguments
        for objective, steps in (("masked", sizes.warmup_steps), ("relay", sizes.steps)):
            is_warmup = objective == "masked"
            train_model(model, self.tokenizer, data, objective, self.seed, sizes, steps, is_warmup=is_warmup)
        return model

    def _plain(self, model: RelayForMaskedDiffusion) -> RelayForMaskedDiffusion:
        # A seed of its own: the start has seen the symmetries of the first one.
        arguments = (self.tokenizer, self.puzzles["train"], "relay", self.seed + 1000, self.arguments)
        train_model(model, *arguments, self.options.more_steps)
        return model

    def _traces(self, start: RelayForMaskedDiffusion) -> Dataset:
        """The start's own solutions of training puzzles that are legal."""
        path = self.folder / f"seed_{self.seed}_traces.json"
        if not path.exists():
            begin = time.perf_counter()
            shown = augment_puzzles(self.puzzles["train"], rows=self.options.trace_puzzles, seed=2 * self.seed + 1001)
            task = TASKS["sudoku"](self.tokenizer, start.config)
            options = {"unmasking_policy": "confidence_budget", "unmasking_threshold": self.options.threshold}
            kept: list[Trace] = []
            for rows in shown.iter(TRACE_BATCH):
                asked = [{"question": question} for question in rows["question"]]
                traces = decode_traces(start.eval(), [task.prompt(row) for row in asked], options)
                kept += [trace for trace, ok in zip(traces, task.are_right(asked, traces), strict=True) if ok]
            path.write_text(json.dumps([asdict(trace) for trace in kept]), encoding="utf-8")
            forwards = mean(trace.costs["denoise_forwards"] for trace in kept)
            made = {"asked": len(shown), "kept": len(kept), "denoise_forwards": forwards}
            self.results["made"] = {**made, "seconds": time.perf_counter() - begin}
            print(f"seed {self.seed}: {self.results['made']}", flush=True)
        columns = ("input_ids", "labels", "reveal_steps")
        rows = json.loads(path.read_text(encoding="utf-8"))
        return Dataset.from_list([{name: row[name] for name in columns} for row in rows])

    def _on_traces(self, model: RelayForMaskedDiffusion, texts: Dataset, stride: int) -> RelayForMaskedDiffusion:
        steps = self.options.more_steps
        config = RelayTrainerConfig(
            str(self.folder),
            **trainer_options("traces", self.arguments),
            trace_stride=stride,
            rows_on_demand=False,  # the rest is as in the demo
            staggered_start=False,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            weight_decay=0.01,
            max_steps=steps,
            seed=self.seed,
            logging_steps=max(steps // 5, 1),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            gradient_checkpointing=False,
            max_length=None,
        )
        RelayTrainer(model, config, train_dataset=texts, processing_class=self.tokenizer).train()
        return model


SIZES = (
    "size", "extra_clues", "puzzles", "test_puzzles", "hidden_size", "layers", "batch_size", "warmup_steps", "steps",
)  # fmt: skip


def curve(evaluations: Evaluations) -> str:
    """Threshold, denoise forwards and exact match in percent, side by side."""
    points = ((e["threshold"], e["denoise_forwards"], 100 * e["scores"]["exact_match"]) for e in evaluations)
    return "  ".join(f"{threshold:g}: {forwards:.2f} {match:.1f}%" for threshold, forwards, match in points)


def forwards_at(evaluations: Evaluations, accuracy: float) -> float:
    """Denoise forwards at which a curve reaches that exact match, linear between thresholds; NaN if it does not."""
    points = sorted((e["scores"]["exact_match"], e["denoise_forwards"]) for e in evaluations)
    matches, forwards = zip(*points, strict=True)
    return float(np.interp(accuracy, matches, forwards, left=np.nan, right=np.nan))


def match_at(evaluations: Evaluations, forwards: float) -> float:
    """Exact match in percent where a curve passes that many denoise forwards; NaN if it does not."""
    points = sorted((e["denoise_forwards"], 100 * e["scores"]["exact_match"]) for e in evaluations)
    passed, matches = zip(*points, strict=True)
    return float(np.interp(forwards, passed, matches, left=np.nan, right=np.nan))


def spread(values: list[float]) -> str:
    """Mean ± standard deviation; a dash if a seed's curve does not reach."""
    if np.isnan(values).any():
        return "–"
    return f"{mean(values):.2f} ± {stdev(values) if len(values) > 1 else 0:.2f}"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: forwards for the start's exact match at each threshold; exact match for its forwards, in percent."""
    names = [name for name in results[0] if name != "made"]
    lines = [f"| | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for index, threshold in enumerate(THRESHOLDS):
        wanted = [result["start"]["evaluations"][index]["scores"]["exact_match"] for result in results]
        cells = []
        for name in names:
            needed = [forwards_at(r[name]["evaluations"], level) for r, level in zip(results, wanted, strict=True)]
            cells.append(spread(needed))
        lines.append(f"| forwards for its {100 * mean(wanted):.1f} % at {threshold:g} | {' | '.join(cells)} |")
    for index, threshold in enumerate(THRESHOLDS):
        spent = [result["start"]["evaluations"][index]["denoise_forwards"] for result in results]
        cells = [spread([match_at(r[n]["evaluations"], f) for r, f in zip(results, spent, strict=True)]) for n in names]
        lines.append(f"| exact match at its {mean(spent):.1f} forwards at {threshold:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", default="runs/traces")
    parser.add_argument("--threshold", type=float, default=0.02, help="confidence budget of the traces")
    parser.add_argument("--strides", type=int, nargs="+", default=[2, 3], help="values of `trace_stride`")
    parser.add_argument("--more_steps", type=int, default=150, help="steps of the two trainings that are compared")
    parser.add_argument("--trace_puzzles", type=int, default=8000, help="puzzles that the start solves")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, default={"batch_size": 64}.get(name, getattr(DemoArguments, name)))
    options = parser.parse_args()
    logging.set_verbosity_error()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = DemoArguments(**{name: getattr(options, name) for name in SIZES})
    puzzles = load_puzzles(arguments)
    studies = [SeedStudy(seed, options, arguments, puzzles, folder) for seed in options.seeds]
    for study in studies:
        study.run()
    text = table([study.results for study in studies])
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
