"""Studies: arms that are trained and evaluated with several seeds, so that what one brings is seen with its spread.

    python benchmarks/study.py text --seeds 0 1 2 3 4
    python benchmarks/study.py rates --seeds 100            # which learning rates suit which channel
    python benchmarks/study.py text_channels --seeds 0 1 2 3 4
    python benchmarks/study.py windows --seeds 0 1 2 3 4 5 6 7 --warmup_steps 1500 --test_puzzles 300
    python benchmarks/study.py channels --processes 2
    python benchmarks/study.py traces --steps 75

Every arm begins with another one, mostly `start`, which is trained from scratch, and trains for as many optimizer steps
as all others; with `--equal_compute ARM`, besides for as many as cost the operations of that arm's steps. What the
output folder holds already is not trained again: a study may be interrupted at any time, and goes on with the same
command.

Results are lines of JSON, one per arm, seed and budget, and the models of all arms. Tables have mean ± standard
deviation over the seeds and the mean of paired differences with its 95 % interval (Student's t).
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from boards_workload import Boards
from study_results import Results, report
from study_runner import START, Arm, Runner
from text_workload import Balances
from transformers.utils import logging

SIZES = (
    "--size", "--extra_clues", "--puzzles", "--test_puzzles", "--hidden_size", "--layers", "--batch_size",
    "--warmup_steps", "--steps",
)  # fmt: skip
PUMBA: dict[str, Any] = {
    "unmasking_policy": "confidence_threshold",
    "unmasking_threshold": 0.9,
    "threshold_jitter": 0.0,
    "unmasking_count": 2,
    "step_reduction": "mean",
    "loss_weight_cap": 5.0,
    "z_loss": 1e-5,
}


SCRATCH = {START: Arm("masked", channel="none", begins=None)}
PLAIN = {
    "masked": Arm("masked", channel="none"),
    "rollout": Arm("rollout", channel="none"),
    "relay_sg": Arm("relay_sg"),
    # As many steps as W = 4 and W = 8, without their gradient.
    "rollout, K = 4": Arm("rollout", {"rollout_steps": 4}, channel="none"),
    "relay_sg, K = 4": Arm("relay_sg", {"rollout_steps": 4}),
    "relay_sg, K = 8": Arm("relay_sg", {"rollout_steps": 8}),
}
# What the gradient through the state brings, and how far back: W steps are differentiated together.
TIED = {"tie_word_embeddings": True}
SHARED = {
    "start, tied": Arm("masked", channel="none", config=TIED, begins=None),
    "rollout, tied": Arm("rollout", channel="none", config=TIED, begins="start, tied"),
    "relay_sg, tied": Arm("relay_sg", config=TIED, begins="start, tied"),
    "relay, W = 2, tied": Arm("relay", {"rollout_steps": 2}, config=TIED, begins="start, tied"),
}
WINDOWS = SCRATCH | PLAIN
WINDOWS |= {f"relay, W = {steps}": Arm("relay", {"rollout_steps": steps}) for steps in (2, 4, 8)}
WINDOWS |= {f"pumba, W = {steps}": Arm("relay", PUMBA | {"rollout_steps": steps}) for steps in (1, 2, 4, 8)}
WINDOWS["pumba, no state"] = Arm("rollout", PUMBA | {"rollout_steps": 2}, channel="none")
# The same without the gradient between steps: as many steps, the same loss.
WINDOWS |= {f"pumba_sg, K = {steps}": Arm("relay_sg", PUMBA | {"rollout_steps": steps}) for steps in (2, 4, 8)}
WINDOWS |= SHARED


def on_traces(teacher: str) -> dict[str, Arm]:
    """A model goes on with its own right answers, in fewer steps than it took; or as before, with more texts."""
    own = {
        f"own traces, stride {stride}": Arm("traces", {"trace_stride": stride}, begins=teacher, on_traces=True)
        for stride in (2, 3)
    }
    return {"more of the same": Arm("relay", begins=teacher), **own}


TRACES = SCRATCH | {"relay": Arm("relay")} | on_traces("relay")
TEXT = {**SCRATCH, "complementary": Arm("complementary", channel="none"), **WINDOWS, **on_traces("relay, W = 2")}

# What a channel brings, as its authors train it and on Relay's rollouts.
SPHERE = {"relay_options": {"mixing": "sphere"}}
METHODS = {
    "masked": Arm("masked", channel="none"),
    "rollout": Arm("rollout", channel="none"),
    "relay": Arm("relay"),
    "relay_sg": Arm("relay_sg"),
    "rcd": Arm("residual_context", channel="residual_context", reference="light"),
    "rcd, heavy reference": Arm("residual_context", channel="residual_context", reference=START),
    "rcd, rollouts": Arm("relay_sg", channel="residual_context"),
    "soft-mask": Arm("residual_context", channel="soft_mask"),
    "soft-mask, rollouts": Arm("relay_sg", channel="soft_mask"),
    "spherical": Arm("residual_context", channel="soft_mask", config=SPHERE),
    "spherical, rollouts": Arm("relay_sg", channel="soft_mask", config=SPHERE),
}


def light(**sizes: int) -> dict[str, Arm]:
    """A reference of about a third of the parameters, as published: 1.7B for 4B and 8B."""
    return {"light": Arm("masked", channel="none", begins=None, sizes=sizes)}


def views_of(arm: Arm) -> dict[str, dict[str, Any]]:
    """What its state does: without it, and begun in the ways that its authors decode with."""
    found: dict[str, dict[str, Any]] = {}
    if arm.channel != "none":
        found["state taken away"] = {"use_relay": False}
    if arm.channel == "layer_norm":
        found["state of zeros"] = {"state": "zeros"}
    if arm.reference:
        found["started by itself"] = {"relay_start": "self"}
        found["started by its reference"] = {"relay_start": "reference", "reference_model": arm.reference}
    return found


CHANNELS = SCRATCH | light(hidden_size=64, layers=2)  # a third at the width of 96 that `docs/sudoku_channels.md` has
CHANNELS |= {name: replace(arm, views=views_of(arm)) for name, arm in METHODS.items()}


COARSE, FINE = (1e-3, 1e-2, 1e-1), (3e-4, 1e-3, 3e-3, 1e-2, 1e-1, 3e-1)
SWEPT = {2.5e-4: COARSE, 7.5e-4: FINE, 2.25e-3: COARSE}  # learning rate of all weights -> of the channel


def sweep(arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """Each arm with several learning rates: of all weights, and of the channel where it has some."""
    found = {}
    for name, arm in arms.items():
        for rate, of_channels in SWEPT.items():
            for of_channel in of_channels if arm.channel in ("layer_norm", "soft_mask") else (None,):
                label = f"{name}: {rate:g}" + (f", {of_channel:g}" if of_channel else "")
                found[label] = at_rates(arm, rate, of_channel)
    return found


def at_rates(arm: Arm, rate: float, of_channel: float | None) -> Arm:
    """The arm with learning rates of its own."""
    rates = {"learning_rate": rate} | ({"relay_learning_rate": of_channel} if of_channel else {})
    return replace(arm, options={**arm.options, **rates})


LIGHT_TEXT = light(hidden_size=32, layers=2)
RATES = SCRATCH | LIGHT_TEXT | sweep(METHODS)
# The best of the sweep, which has a seed of its own; the rates of `relay_sg` are those of `relay`.
BEST_RATES = {
    "masked": (7.5e-4, None),
    "rollout": (7.5e-4, None),
    "relay": (7.5e-4, 1e-3),
    "relay_sg": (7.5e-4, 1e-3),
    "rcd": (2.5e-4, None),
    "rcd, rollouts": (7.5e-4, None),
    "soft-mask": (7.5e-4, 3e-3),
    "soft-mask, rollouts": (7.5e-4, 3e-1),
    "spherical": (7.5e-4, 3e-3),
    "spherical, rollouts": (7.5e-4, 1e-1),
}
TEXT_CHANNELS = SCRATCH | LIGHT_TEXT | {name: at_rates(METHODS[name], *rates) for name, rates in BEST_RATES.items()}
TEXT_CHANNELS["rcd"] = replace(TEXT_CHANNELS["rcd"], views=views_of(METHODS["rcd"]))


@dataclass(frozen=True)
class Study:
    """What a name on the command line means.

    Args:
        workload: class of what is trained on.
        arms: name -> arm.
        against: arms that all others are compared with.
        pictured: arms in the pictures; more would hide each other.
    """

    workload: type
    arms: Mapping[str, Arm]
    against: tuple[str, ...]
    pictured: tuple[str, ...]


STUDIES = {
    "traces": Study(Boards, TRACES, ("relay", "more of the same"), tuple(TRACES)[1:]),
    "channels": Study(Boards, CHANNELS, ("masked", "rollout"), ("masked", "relay", "relay_sg", "rcd", "soft-mask")),
    "text_channels": Study(
        Balances,
        TEXT_CHANNELS,
        ("masked", "rollout", "relay", "relay_sg"),
        ("rollout", "relay", "relay_sg", "soft-mask, rollouts", "spherical, rollouts"),
    ),
    "rates": Study(Balances, RATES, (), ()),
    "windows": Study(
        Boards,
        WINDOWS,
        ("rollout", "relay_sg", "relay, W = 2", "relay_sg, K = 4", "rollout, tied", "relay_sg, tied"),
        ("masked", "rollout", "relay_sg", "relay, W = 2", "relay, W = 4"),
    ),
    "text": Study(
        Balances,
        TEXT,
        (
            *("complementary", "rollout", "rollout, K = 4", "relay_sg", "relay_sg, K = 4", "relay_sg, K = 8"),
            *("pumba, no state", "pumba_sg, K = 2", "pumba, W = 2", "pumba_sg, K = 4", "pumba_sg, K = 8"),
            *("rollout, tied", "relay_sg, tied"),
        ),
        ("complementary", "rollout", "relay_sg", "relay, W = 2", "pumba, W = 8"),
    ),
}


def begin_process() -> None:
    """One thread, because sums of several differ in their last digits; no notes of the libraries."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()


def run_seed(study: str, sizes: dict[str, Any], folder: Path, arms: list[str], seed: int, equal: str | None) -> None:
    """All arms of one seed, one after the other."""
    runner = Runner(STUDIES[study].workload(**sizes), STUDIES[study].arms, folder)
    for equal_compute in (None, equal) if equal else (None,):
        for name in arms:
            if equal_compute is None or runner.arms[name].begins:
                runner.run(name, seed, equal_compute)


def claim(folder: Path, study: str, sizes: dict[str, Any]) -> None:
    """Makes the folder and writes whose results it holds.

    Raises:
        ValueError: it holds results of another study, or of other sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described, text = folder / "study.json", json.dumps({"study": study, "sizes": sizes})
    if described.exists() and described.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"`--output_dir={folder}` holds results of {described.read_text(encoding='utf-8')}, not of {text}: "
            "choose another folder, or the same study and sizes."
        )
    described.write_text(text, encoding="utf-8")


def run_study(
    study: str,
    sizes: dict[str, Any],
    folder: Path,
    arms: Iterable[str] = (),
    seeds: Iterable[int] = (0, 1, 2),
    processes: int = 1,
    equal_compute: str | None = None,
) -> str:
    """Runs what is missing and reads everything that there is.

    Args:
        study: key of `STUDIES`.
        sizes: of its workload.
        folder: where everything is kept.
        arms: the arms to run; none = all.
        seeds: the seeds to run.
        processes: seeds that run side by side.
        equal_compute: see `Runner.run`; None = equal steps alone.

    Returns:
        The tables, as Markdown; they are also written, beside the pictures.

    Raises:
        ValueError: an arm is unknown, or the folder holds results of other sizes.
    """
    known = STUDIES[study].arms
    if unknown := set(arms) - set(known):
        raise ValueError(f"`--arms` has {sorted(unknown)}, which `{study}` has not: choose from {list(known)}.")
    needed = {other for name in arms for other in (known[name].begins, known[name].reference)}
    arms = [name for name in known if not arms or name in {*arms, *needed, START}]
    claim(folder, study, sizes)
    jobs = [(study, sizes, folder, arms, seed, equal_compute) for seed in seeds]
    if processes == 1:
        for job in jobs:
            run_seed(*job)
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=begin_process) as pool:
            for future in [pool.submit(run_seed, *job) for job in jobs]:
                future.result()
    asked = STUDIES[study]
    found = Results(folder / "results.jsonl").lines()
    tables = report(found, asked.workload, asked.against, asked.pictured, folder)
    (folder / "tables.md").write_text(tables + "\n", encoding="utf-8")
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: only the tables of what is there"
    )
    parser.add_argument("--arms", nargs="+", default=[], help="names of arms; all by default")
    parser.add_argument("--equal_compute", metavar="ARM", help="also train for as many operations as this arm")
    parser.add_argument("--processes", type=int, default=1, help="seeds that run side by side, with one thread each")
    parser.add_argument("--output_dir", type=Path, help="runs/STUDY by default")
    for name in SIZES:
        parser.add_argument(name, type=int, help="the workload's own by default")
    options = vars(parser.parse_args())
    study, folder = options.pop("study"), options.pop("output_dir")
    run = {name: options.pop(name) for name in ("seeds", "arms", "equal_compute", "processes")}
    sizes = {name: value for name, value in options.items() if value is not None}
    begin_process()
    print(run_study(study, sizes, folder or Path("runs", study), **run))


if __name__ == "__main__":
    main()
