"""What do longer windows bring? Relay's loss and PUMBA's on 6x6 Sudoku, at equal optimizer steps and equal forwards.

    python benchmarks/windows.py [--seeds 0 1 2] [--batch_size 64]

Each seed trains one masked diffusion model from scratch; from it every method goes on for as many optimizer steps, each
of which makes W denoising steps that are differentiated together. "relay" reveals by the confidence budget of the
published Sudoku recipe and adds the losses of the steps; "pumba" reveals the two surest cells and all above 0.9, weighs
a cell by min(1/t, 5), adds a z-loss of 1e-5, and takes the mean of the steps (arXiv 2609.37974). "no carry" is the same
rollout without a state. All are decoded by the confidence budget at five thresholds. What the output folder holds
already is not trained again.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sudoku_channels import at_equal_forwards
from transformers import set_seed
from transformers.utils import logging

from relay_hf import RelayForMaskedDiffusion
from relay_hf.demo.arguments import DemoArguments
from relay_hf.demo.study import THRESHOLDS, load_puzzles, new_model, train_model
from relay_hf.tasks.sudoku import evaluate_sudoku, make_sudoku_tokenizer

PUMBA: dict[str, Any] = {
    "unmasking_policy": "confidence_threshold",
    "unmasking_threshold": 0.9,
    "unmasking_count": 2,
    "threshold_jitter": 0.0,
    "step_reduction": "mean",
    "loss_weight_cap": 5.0,
    "z_loss": 1e-5,
}
# Name -> objective and what differs from the demo's recipe.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "relay, no carry": ("rollout", {"rollout_steps": 2}),
    **{f"relay, W = {steps}": ("relay", {"rollout_steps": steps}) for steps in (1, 2, 4)},
    "pumba, no carry": ("rollout", PUMBA | {"rollout_steps": 2}),
    **{f"pumba, W = {steps}": ("relay", PUMBA | {"rollout_steps": steps}) for steps in (1, 2, 4, 8)},
}
BASELINE = "relay, no carry"
FORWARDS = (3.0, 3.25, 3.5, 3.75)  # denoise forwards per puzzle that all curves reach


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
        self.results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.tokenizer, self.puzzles = make_sudoku_tokenizer(arguments.size), load_puzzles(arguments)

    def run(self) -> dict[str, Any]:
        """Trains what is missing; returns evaluations and seconds by method."""
        missing = [name for name in METHODS if name not in self.results]
        if missing:
            set_seed(self.seed)
            start = new_model(self.arguments, self.tokenizer)
            self._train(start, "masked", self.arguments.warmup_steps, is_warmup=True)
        for name in missing:
            objective, options = METHODS[name]
            set_seed(self.seed)
            model = new_model(self.arguments, self.tokenizer)
            model.load_state_dict(start.state_dict())
            seconds = self._train(model, objective, self.arguments.steps, options=options)
            self.results[name] = {"seconds": seconds, "curve": self._evaluate(model, use_relay=objective == "relay")}
            self.path.write_text(json.dumps(self.results), encoding="utf-8")
            print(
                f"seed {self.seed}, {name}: {seconds:.0f} s, {at_equal_forwards(self.results[name]['curve'], FORWARDS)}"
            )
        return self.results

    def _train(self, model: RelayForMaskedDiffusion, objective: str, steps: int, **options: Any) -> float:
        began = time.process_time()
        data = self.puzzles["train"]
        train_model(model, self.tokenizer, data, objective, self.seed, self.arguments, steps, **options)
        return time.process_time() - began

    def _evaluate(self, model: RelayForMaskedDiffusion, use_relay: bool) -> list[dict[str, Any]]:
        puzzles = self.puzzles["test"]
        options: dict[str, Any] = {"use_relay": use_relay, "progress": False}
        return [asdict(evaluate_sudoku(model, self.tokenizer, puzzles, t, **options)) for t in THRESHOLDS]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: exact match at equal forwards, and its gain over `BASELINE` of the same seed; exact match and forwards
    at the surest threshold; processor time."""
    surest = f"threshold {THRESHOLDS[0]:g}"
    header = ["method", *(f"{forwards:g} forwards" for forwards in FORWARDS), surest, "training time"]
    lines = [" | ".join(header), " | ".join(["---"] * len(header))]
    baseline = np.array([at_equal_forwards(result[BASELINE]["curve"], FORWARDS) for result in results])
    for name in METHODS:
        curves = [result[name]["curve"] for result in results]
        values = np.array([at_equal_forwards(curve, FORWARDS) for curve in curves])  # (seeds, forwards)
        gains = values - baseline
        spread = gains.std(0, ddof=1) if len(results) > 1 else np.zeros(len(FORWARDS))
        cells = [
            f"{value:.1f} ({gain:+.1f} ± {deviation:.1f})"
            for value, gain, deviation in zip(values.mean(0), gains.mean(0), spread, strict=True)
        ]
        exact = 100 * np.mean([curve[0]["scores"]["exact_match"] for curve in curves])
        forwards = np.mean([curve[0]["denoise_forwards"] for curve in curves])
        times = np.mean([result[name]["seconds"] / result["relay, W = 1"]["seconds"] for result in results])
        lines.append(" | ".join([name, *cells, f"{exact:.1f} at {forwards:.2f}", f"{times:.1f}"]))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output_dir", default="runs/windows")
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
    seeds, folder = options.pop("seeds"), Path(options["output_dir"])
    torch.set_num_threads(options.pop("threads"))
    logging.set_verbosity_error()
    folder.mkdir(parents=True, exist_ok=True)
    arguments = DemoArguments(**options)
    text = table([SeedStudy(seed, arguments, folder / f"seed_{seed}.json").run() for seed in seeds])
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
