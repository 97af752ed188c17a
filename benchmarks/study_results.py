"""What studies have found: kept as lines of JSON, and read as tables and pictures.

A line is one arm, trained with one seed and one budget: `arm`, `seed`, `budget` ("steps" or "compute"), `steps`,
`operations` and processor `seconds` of its training, and `curves`: view -> one point per threshold, with mean denoise
`forwards`, share of `exact` replies, and wall `seconds` and floating-point `operations` per reply.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from relay_hf.pictures import CurvePoint, plot_accuracy_against_forwards

FEWEST = 3  # seeds that a difference needs: the interval of two is a dozen of their standard deviations
Line = dict[str, Any]
Curve = list[dict[str, Any]]
Curves = dict[str, dict[int, Curve]]  # arm -> seed -> curve
Rows = dict[str, dict[int, list[float]]]


class Results:
    """Lines in a file that processes append to side by side.

    Args:
        path: the file; what is no whole line in it, because a process ended while it wrote, is passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[Line]:
        """All lines, in the order in which they were written."""
        found = []
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(text))
            except json.JSONDecodeError:
                continue
        return found

    def find(self, arm: str, seed: int, budget: str) -> Line | None:
        """The line of an arm; None if there is none yet."""
        same = (line for line in self.lines() if (line["arm"], line["seed"], line["budget"]) == (arm, seed, budget))
        return next(same, None)

    def add(self, line: Line) -> None:
        """Writes a line at once, so that lines of several processes never mix."""
        is_cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("ab", buffering=0) as file:
            file.write(b"\n" * is_cut + json.dumps(line).encode() + b"\n")


def score_at(curve: Curve, cost: float) -> float:
    """Exact match in percent where a curve passes that many forwards, linear between thresholds; NaN if it does not."""
    return score_within(curve, cost) if cost <= max(point["forwards"] for point in curve) else float("nan")


def score_within(curve: Curve, cost: float) -> float:
    """The same for at most that many forwards: a curve that needs fewer keeps the score that it ends with."""
    points = sorted((point["forwards"], 100 * point["exact"]) for point in curve)
    costs, scores = zip(*points, strict=True)
    return float(np.interp(cost, costs, scores, left=np.nan))


def cost_at(curve: Curve, score: float) -> float:
    """Least forwards at which a curve reaches that exact match in percent, linear between thresholds; NaN if it does
    not, or if it has more with the fewest."""
    points = sorted((point["forwards"], 100 * point["exact"]) for point in curve)
    if points[0][1] == score:
        return points[0][0]
    for (cost, before), (next_cost, after) in pairwise(points):
        if before < score <= after:
            return cost + (score - before) / (after - before) * (next_cost - cost)
    return float("nan")


def interval(values: Sequence[float]) -> float:
    """Half the 95 % interval of a mean over seeds (Student's t); NaN for one seed."""
    count = len(values)
    return float(student.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5) if count > 1 else float("nan")


def table(title: str, columns: Sequence[str], rows: Rows, against: str | None = None) -> str:
    """Markdown: mean ± standard deviation over the seeds; or mean and 95 % interval of differences to an arm of the
    same seed. A dash where not all seeds have a number.

    Args:
        title: head of the first column.
        columns: heads of the others.
        rows: arm -> seed -> a number per column, NaN where there is none.
        against: the arm to compare with.
    """
    lines = [[title, "seeds", *columns], ["---"] * (len(columns) + 2)]
    for name, by_seed in rows.items():
        seeds = [seed for seed in by_seed if against is None or seed in rows[against]]
        values = np.array([by_seed[seed] for seed in seeds])  # (seeds, columns)
        if against is None:
            cells = [f"{at.mean():.1f} ± {at.std(ddof=1):.1f}" if len(at) > 1 else f"{at[0]:.1f}" for at in values.T]
        elif name == against or len(seeds) < FEWEST:
            continue
        else:
            gains = values - np.array([rows[against][seed] for seed in seeds])
            cells = [f"{gain.mean():+.1f} ± {interval(gain):.1f}" for gain in gains.T]
        lines.append([name, str(len(seeds)), *("–" if "nan" in cell else cell for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(lines: list[Line], workload: Any, against: Sequence[str], pictured: Sequence[str], folder: Path) -> str:
    """All tables of a study, a budget after the other; draws its pictures into the folder."""
    parts = []
    for budget in sorted({line["budget"] for line in lines}, reverse=True):
        of_budget = [line for line in lines if line["budget"] == budget]
        curves: Curves = {}
        for line in of_budget:
            for view, curve in line["curves"].items():
                curves.setdefault(line["arm"] + (f": {view}" if view else ""), {})[line["seed"]] = curve
        readings: dict[str, dict[str, Callable[[Curve], float]]] = {
            "exact match, %": {f"{cost:g} forwards": partial(score_at, cost=cost) for cost in workload.forwards},
            "forwards": {f"for {score:g} %": partial(cost_at, score=score) for score in workload.levels},
            "surest threshold": {
                "exact match, %": lambda c: 100 * c[0]["exact"],
                "forwards": lambda c: c[0]["forwards"],
            },
        }
        parts.append(f"## Equal {budget}")
        for title, columns in readings.items():
            rows = {
                name: {seed: [read(curve) for read in columns.values()] for seed, curve in by_seed.items()}
                for name, by_seed in curves.items()
            }
            parts.append(table(title, list(columns), rows))
            if title != "surest threshold":
                parts += [table(f"{title}, minus `{arm}`", list(columns), rows, arm) for arm in against if arm in rows]
        for arm in against:
            if arm in curves:
                parts += [scores_within(curves, arm), costs_for(curves, arm)]
        parts.append(costs(of_budget))
        draw({name: curves[name] for name in pictured if name in curves}, f"equal {budget}", workload, folder)
    return "\n\n".join(parts)


def scores_within(curves: Curves, arm: str) -> str:
    """Markdown: how much more often right each arm is with at most the forwards of one arm, of the same seed, at its
    thresholds; for seeds whose curves lie at different forwards."""
    rows = at_points(curves, arm, lambda curve, allowed: score_within(curve, allowed["forwards"]))
    columns = [f"{forwards:.1f} forwards (at {point:g})" for point, forwards in means_at(curves[arm], "forwards")]
    return table(f"exact match, %, minus `{arm}`, within its forwards", columns, rows, arm)


def costs_for(curves: Curves, arm: str) -> str:
    """Markdown: forwards that each arm takes to be as often right as one arm, with the same seed, at its thresholds."""
    rows = at_points(curves, arm, lambda curve, wanted: cost_at(curve, 100 * wanted["exact"]))
    columns = [f"{100 * exact:.1f} % (at {point:g})" for point, exact in means_at(curves[arm], "exact")]
    return table(f"forwards for the exact match of `{arm}`", columns, rows)


def at_points(curves: Curves, arm: str, read: Callable[[Curve, dict[str, Any]], float]) -> Rows:
    """What is read of each curve for every point of one arm's curve of the same seed; arms without such seeds are left
    out."""
    rows = {
        name: {
            seed: [read(curve, point) for point in curves[arm][seed]]
            for seed, curve in by_seed.items()
            if seed in curves[arm]
        }
        for name, by_seed in curves.items()
    }
    return {name: of_seeds for name, of_seeds in rows.items() if of_seeds}


def means_at(by_seed: dict[int, Curve], key: str) -> list[tuple[float, float]]:
    """Thresholds, and at each the mean over the seeds."""
    together = zip(*by_seed.values(), strict=True)
    return [(points[0]["threshold"], float(np.mean([point[key] for point in points]))) for points in together]


def costs(lines: list[Line]) -> str:
    """Markdown: what the trainings cost, means over the seeds."""
    rows = ["| training | steps | operations, 10^12 | processor seconds |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys(line["arm"] for line in lines):
        same = [line for line in lines if line["arm"] == name]
        steps, operations, seconds = (
            np.mean([line[key] for line in same]) for key in ("steps", "operations", "seconds")
        )
        rows.append(f"| {name} | {steps:.0f} | {operations / 1e12:.2f} | {seconds:.0f} |")
    return "\n".join(rows)


def draw(curves: Curves, title: str, workload: Any, folder: Path) -> None:
    """Accuracy against forwards, wall time and operations: means over the seeds, bars of one standard deviation."""
    axes = {"forwards": (1, "denoise forwards"), "seconds": (1e3, "ms"), "operations": (1e-6, "operations, 10^6,")}
    for axis, (scale, cost) in axes.items():
        points = {
            name: [mean_point(at_threshold, axis, scale) for at_threshold in zip(*by_seed.values(), strict=True)]
            for name, by_seed in curves.items()
        }
        path = folder / f"{title.replace(' ', '_')}_{axis}.png"
        if points:
            seeds = max(map(len, curves.values()))
            head = f"{workload.title}, {title}, {seeds} seed" + "s" * (seeds > 1)
            plot_accuracy_against_forwards(points, path, head, unit=workload.unit, cost=cost)


def mean_point(evaluations: Sequence[dict[str, Any]], axis: str, scale: float) -> CurvePoint:
    """One point of a picture from the evaluations of several seeds at one threshold."""
    exact, cost = ([evaluation[key] for evaluation in evaluations] for key in ("exact", axis))
    spread = float(np.std(exact, ddof=1)) if len(exact) > 1 else None
    return CurvePoint(evaluations[0]["threshold"], scale * float(np.mean(cost)), float(np.mean(exact)), spread)
