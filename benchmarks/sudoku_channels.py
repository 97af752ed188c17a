"""Every channel on the same puzzles: accuracy against forwards, at equal optimizer steps and at equal compute.

    python benchmarks/sudoku_channels.py [--seeds 0 1 2] [--processes 2]

Each seed trains one masked diffusion model from scratch. From it every method starts: the body, a fresh channel, and as
many optimizer steps as all others; or as many as make its training cost (floating-point operations of forward, backward
and reference passes, counted in its own first steps) that of `relay`. Everything else is the demo's recipe. Controls
decode the trained models with the state taken away, or started otherwise. Writes results, tables and two pictures; what
the output folder holds already is not trained again.
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import set_seed
from transformers.utils import logging

from relay_hf import RelayForMaskedDiffusion
from relay_hf.demo.arguments import DemoArguments
from relay_hf.demo.study import THRESHOLDS, load_puzzles, new_model, train_model
from relay_hf.pictures import CurvePoint, plot_accuracy_against_forwards
from relay_hf.tasks.sudoku import evaluate_sudoku, make_sudoku_tokenizer

COUNTED_STEPS = 8
# Where the curves are compared: denoise forwards per puzzle that all of them reach.
FORWARDS = (3.0, 3.5, 4.0, 4.5, 5.0)


Evaluations = list[dict[str, Any]]  # one per threshold


@dataclass(frozen=True)
class Method:
    """A channel, how it is trained, and what supplies the state meanwhile: the model that all start from, a light
    one, or nothing but the model itself."""

    channel: Any
    objective: Any
    reference: Literal["start", "light"] | None = None


METHODS = {
    "none": Method("none", "masked"),
    "rollout": Method("none", "rollout"),
    "relay": Method("layer_norm", "relay"),
    "relay_sg": Method("layer_norm", "relay_sg"),
    "rcd": Method("residual_context", "residual_context", reference="light"),
    "rcd, heavy reference": Method("residual_context", "residual_context", reference="start"),
    "rcd, rollouts": Method("residual_context", "relay_sg"),
    "soft-mask": Method("soft_mask", "residual_context"),
    "soft-mask, rollouts": Method("soft_mask", "relay_sg"),
}


class SeedStudy:
    """Everything that is trained and evaluated with one seed.

    Args:
        seed: of all randomness.
        arguments: the sizes of the study.
        path: JSON file of the results so far; methods in it are left out.
    """

    def __init__(self, seed: int, arguments: DemoArguments, path: Path) -> None:
        self.seed = seed
        self.arguments = arguments
        self.path = path
        self.results: dict[str, dict[str, Any]] = {"costs": {}, "steps": {}, "equal_steps": {}, "equal_compute": {}}
        if path.exists():
            self.results = json.loads(path.read_text(encoding="utf-8"))

    def run(self) -> None:
        """Trains what is missing, `relay` first: its cost is what the others may spend."""
        missing = [name for name in METHODS if name not in self.results["equal_compute"]]
        if not missing:
            return
        arguments = self.arguments
        self.tokenizer, self.puzzles = make_sudoku_tokenizer(arguments.size), load_puzzles(arguments)
        # About a third of the parameters, as published: 1.7B for 4B and 8B.
        width = max(arguments.hidden_size * 2 // 3 // 32 * 32, 32)
        light = replace(arguments, hidden_size=width, layers=max(arguments.layers - 1, 1))
        self.start = self._from_scratch(arguments)
        self.references = {"start": self.start, "light": self._from_scratch(light), None: None}
        self.results["equal_steps"].setdefault("warm start", self._evaluate(self.start, use_relay=False))
        for name in sorted(missing, key=lambda name: name != "relay"):
            print(f"seed {self.seed}: {name}", flush=True)
            self._run_method(name, METHODS[name])
            self.path.write_text(json.dumps(self.results), encoding="utf-8")

    def _run_method(self, name: str, method: Method) -> None:
        results, uses_state = self.results, method.channel != "none"
        with FlopCounterMode(display=False) as counter:
            self._adapt(method, COUNTED_STEPS)
        results["costs"][name] = counter.get_total_flops() / COUNTED_STEPS
        steps = max(round(self.arguments.steps * results["costs"]["relay"] / results["costs"][name]), 1)
        model = self._adapt(method, self.arguments.steps)
        curves = results["equal_steps"]
        curves[name] = self._evaluate(model, use_relay=uses_state)
        if uses_state:
            curves[f"{name}: state taken away"] = self._evaluate(model, use_relay=False)
        if method.reference:
            reference = self.references[method.reference]
            curves[f"{name}: started by itself"] = self._evaluate(model, relay_start="self")
            curves[f"{name}: started by its reference"] = self._evaluate(
                model, relay_start="reference", reference_model=reference
            )
        if method.channel == "layer_norm":
            with_zeros(model)
            curves[f"{name}: state of zeros"] = self._evaluate(model)
        results["steps"][name] = steps
        results["equal_compute"][name] = curves[name]
        if steps != self.arguments.steps:
            results["equal_compute"][name] = self._evaluate(self._adapt(method, steps), use_relay=uses_state)

    def _from_scratch(self, arguments: DemoArguments) -> RelayForMaskedDiffusion:
        set_seed(self.seed)
        model, data = new_model(arguments, self.tokenizer, "none"), self.puzzles["train"]
        steps = arguments.warmup_steps
        train_model(model, self.tokenizer, data, "masked", self.seed, arguments, steps, is_warmup=True)
        return model

    def _adapt(self, method: Method, steps: int) -> RelayForMaskedDiffusion:
        set_seed(self.seed)
        model = new_model(self.arguments, self.tokenizer, method.channel)
        model.load_state_dict(self.start.state_dict(), strict=False)
        data, reference = self.puzzles["train"], self.references[method.reference]
        train_model(
            model, self.tokenizer, data, method.objective, self.seed, self.arguments, steps, reference_model=reference
        )
        return model

    def _evaluate(self, model: RelayForMaskedDiffusion, **options: Any) -> Evaluations:
        tokenizer, puzzles = self.tokenizer, self.puzzles["test"]
        return [
            asdict(evaluate_sudoku(model, tokenizer, puzzles, threshold, progress=False, **options))
            for threshold in THRESHOLDS
        ]


def run_seed(seed: int, arguments: DemoArguments, path: Path, threads: int) -> None:
    """Runs one seed in a process of its own."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    SeedStudy(seed, arguments, path).run()


def with_zeros(model: RelayForMaskedDiffusion) -> None:
    """Makes every carried state zeros, so that of the channel only its bias is left."""
    next_state = model.relay.next_state
    model.relay.next_state = lambda readings: torch.zeros_like(next_state(readings))


def curve_points(results: list[dict[str, Any]], part: str, name: str) -> list[CurvePoint]:
    """One point per threshold, averaged over the seeds."""
    points = []
    for index, threshold in enumerate(THRESHOLDS):
        runs = [result[part][name][index] for result in results]
        accuracy = [run["scores"]["exact_match"] for run in runs]
        spread = stdev(accuracy) if len(runs) > 1 else None
        points.append(CurvePoint(threshold, mean(run["denoise_forwards"] for run in runs), mean(accuracy), spread))
    return points


def at_equal_forwards(run: Evaluations, at: Sequence[float] = FORWARDS) -> list[float]:
    """Exact match in percent where a curve passes those forwards, linear between thresholds; NaN outside of it."""
    points = sorted((point["denoise_forwards"], 100 * point["scores"]["exact_match"]) for point in run)
    forwards, accuracy = zip(*points, strict=True)
    return [float(value) for value in np.interp(at, forwards, accuracy, left=np.nan, right=np.nan)]


def table(results: list[dict[str, Any]], part: str) -> str:
    """Markdown: exact match at equal forwards, and its gain over `none` of the same seed, mean ± standard deviation."""
    header = [part.replace("_", " "), *(f"{forwards:g} forwards" for forwards in FORWARDS)]
    lines = [" | ".join(header), " | ".join(["---"] * len(header))]
    baseline = np.array([at_equal_forwards(result[part]["none"]) for result in results])  # (seeds, forwards)
    for name in sorted(results[0][part], key=lambda name: [*METHODS, "warm start"].index(name.split(":")[0])):
        values = np.array([at_equal_forwards(result[part][name]) for result in results])
        gains = values - baseline
        spread = gains.std(0, ddof=1) if len(results) > 1 else np.zeros(len(FORWARDS))
        cells = [
            "–"
            if np.isnan(gain)
            else f"{value:.1f}"
            if name == "none"
            else f"{value:.1f} ({gain:+.1f} ± {deviation:.1f})"
            for value, gain, deviation in zip(values.mean(0), gains.mean(0), spread, strict=True)
        ]
        lines.append(" | ".join([name, *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def report(results: list[dict[str, Any]], folder: Path, arguments: DemoArguments) -> str:
    """Both tables and what each method costs; draws both pictures."""
    compared = ["none", "relay", "relay_sg", "rcd", "soft-mask"]  # as published; more would hide each other
    for part in ("equal_steps", "equal_compute"):
        curves = {name: curve_points(results, part, name) for name in compared}
        title = f"{arguments.size}x{arguments.size} Sudoku, {part.replace('_', ' ')}, {len(results)} seeds"
        plot_accuracy_against_forwards(curves, folder / f"sudoku_channels_{part}.png", title=title)
    lines = ["| method | operations per step, of `none` | steps for equal compute |", "| --- | --- | --- |"]
    for name in METHODS:
        cost = mean(result["costs"][name] / result["costs"]["none"] for result in results)
        lines.append(f"| {name} | {cost:.2f} | {', '.join(str(result['steps'][name]) for result in results)} |")
    return "\n\n".join([table(results, "equal_steps"), table(results, "equal_compute"), "\n".join(lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="seeds trained at a time")
    parser.add_argument("--output_dir", default="runs/sudoku_channels")
    sizes = (
        "--steps",
        "--warmup_steps",
        "--puzzles",
        "--test_puzzles",
        "--batch_size",
        "--hidden_size",
        "--layers",
        "--size",
    )
    for name in sizes:
        parser.add_argument(name, type=int, default=getattr(DemoArguments, name.removeprefix("--")))
    options = vars(parser.parse_args())
    folder, seeds, processes = Path(options["output_dir"]), options.pop("seeds"), options.pop("processes")
    arguments = DemoArguments(**options)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {seed: folder / f"seed_{seed}.json" for seed in seeds}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        threads = max((os.cpu_count() or 1) // processes, 1)
        for future in [pool.submit(run_seed, seed, arguments, path, threads) for seed, path in paths.items()]:
            future.result()
    text = report([json.loads(path.read_text(encoding="utf-8")) for path in paths.values()], folder, arguments)
    (folder / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
