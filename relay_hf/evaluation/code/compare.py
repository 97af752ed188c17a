"""Two evaluations, problem by problem: is the difference more than chance?"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import mean

from ..forwards import FORWARDS
from .report import draw_picture, read_results
from .samples import SETTINGS, Sample, read_samples, read_settings

SIGNIFICANT = 0.05
# Where two evaluations must differ, or may: the rest of the settings should be equal.
OF_THE_MODEL = {"model", "weights"}


@dataclass(frozen=True)
class Pairs:
    """A quantity of two runs A and B on the same problems.

    Args:
        problems: the number of problems.
        mean_a, mean_b: over the problems.
        a_higher, b_higher: problems in which one run's value is higher; the others say nothing of the difference.
    """

    problems: int
    mean_a: float
    mean_b: float
    a_higher: int
    b_higher: int

    @property
    def p_value(self) -> float:
        """Of the exact two-sided sign test; for passed or not, that is the exact McNemar test."""
        return sign_test(self.a_higher, self.b_higher)


def sign_test(first: int, second: int) -> float:
    """Probability of a split at least as uneven, if each of `first + second` problems fell to either side by chance.

    Returns:
        p in (0, 1], computed exactly.
    """
    total = first + second
    tail = sum(comb(total, count) for count in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2**total)


def pair_samples(a: Sequence[Sample], b: Sequence[Sample]) -> dict[str, Pairs]:
    """Pairs of "passed" and of each kind of forward.

    Raises:
        ValueError: the runs answered different problems.
    """
    if [sample.task_id for sample in a] != [sample.task_id for sample in b]:
        raise ValueError(
            f"The runs answered different problems ({len(a)} and {len(b)}): evaluate both to the end on the same "
            "benchmark, with the same `--limit`."
        )
    pairs = {}
    for name in ("passed", *FORWARDS):
        values = [(int(getattr(x, name)), int(getattr(y, name))) for x, y in zip(a, b, strict=True)]
        pairs[name] = Pairs(
            problems=len(values),
            mean_a=mean(x for x, _ in values),
            mean_b=mean(y for _, y in values),
            a_higher=sum(x > y for x, y in values),
            b_higher=sum(y > x for x, y in values),
        )
    return pairs


def compare_runs(a: str, b: str, picture: str | None = None) -> str:
    """Compares two evaluations.

    Args:
        a, b: two output folders of `relay-hf eval`, which are compared at every threshold they share; or two of their
            files of answers, for instance at thresholds that need as many forwards.
        picture: PNG file to draw the curves of both folders in.

    Returns:
        Text for the terminal: accuracy, forwards, and how likely chance alone is.

    Raises:
        OSError: a folder or file does not exist.
        ValueError: the two share no threshold, answered different problems, or are files and shall be drawn.
    """
    first, second = Path(a), Path(b)
    if missing := [str(path) for path in (first, second) if not path.exists()]:
        raise OSError(f"`{missing[0]}` does not exist: give an output folder of `relay-hf eval`, or a file in it.")
    folders = first.is_dir()
    if folders != second.is_dir():
        raise ValueError(f"`{a}` and `{b}` are a folder and a file: give two output folders, or two files.")
    if picture and not folders:
        raise ValueError(f"`--picture={picture}` needs the curves of two evaluations: give two output folders.")
    if folders:
        names = sorted({path.name for path in first.glob("samples_*.jsonl")} & {p.name for p in second.glob("*")})
        files = [(first / name, second / name) for name in names]
    else:
        files = [(first, second)]
    if not files:
        raise ValueError(f"`{a}` and `{b}` share no threshold: evaluate both at one, or give two files of answers.")
    parts = [differing_settings(files[0][0].parent, files[0][1].parent)]
    for file_a, file_b in files:
        title = file_a.stem if file_a.stem == file_b.stem else f"{file_a.stem} / {file_b.stem}"
        parts.append(f"{title}\n{format_pairs(pair_samples(read_samples(file_a), read_samples(file_b)))}")
    if picture:
        (settings, results_a), (_, results_b) = read_results(first), read_results(second)
        labels = (first.name, second.name) if first.name != second.name else ("A", "B")
        draw_picture(dict(zip(labels, (results_a, results_b), strict=True)), Path(picture), str(settings["benchmark"]))
    return "\n\n".join(part for part in parts if part)


def format_pairs(pairs: dict[str, Pairs]) -> str:
    """What `pair_samples` found, in a table and a sentence."""
    lines = ["per problem              A         B   B against A   sign test"]
    for name in FORWARDS:
        pair = pairs[name]
        change = f"{pair.mean_b / pair.mean_a - 1:+.1%}" if pair.mean_a else ""
        lines.append(f"{name:16}  {pair.mean_a:8.1f}  {pair.mean_b:8.1f}  {change:>12}   p = {pair.p_value:.2g}")
    return "\n".join([*lines, describe_accuracy(pairs["passed"])])


def describe_accuracy(passed: Pairs, a: str = "A", b: str = "B") -> str:
    """Both accuracies under the runs' names, and whether chance explains the difference: two lines."""
    gain = 100 * (passed.mean_b - passed.mean_a)
    verdict = "more than chance explains" if passed.p_value < SIGNIFICANT else "chance alone may explain it"
    return (
        f"pass@1: {a} {passed.mean_a:.1%}, {b} {passed.mean_b:.1%}: {gain:+.1f} points, where one problem of "
        f"{passed.problems} is {100 / passed.problems:.2f}.\n"
        f"{passed.b_higher} problems only {b} solves, {passed.a_higher} only {a}. Exact McNemar test: p = "
        f"{passed.p_value:.2g}, {verdict} (significant below {SIGNIFICANT})."
    )


def differing_settings(a: Path, b: Path) -> str:
    """A line that names settings, besides the model, in which the evaluations of two folders differ; often empty."""
    if not all((folder / SETTINGS).exists() for folder in (a, b)):
        return ""
    first, second = read_settings(a), read_settings(b)
    names = [name for name in first if name not in OF_THE_MODEL and first[name] != second.get(name)]
    return f"Note: beside the model, the evaluations differ in {', '.join(names)}." if names else ""
