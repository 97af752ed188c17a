"""What a model card knows. Plain facts, checked when they are given; how they look is decided in `render.py`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .citations import RELAY_CITATION

NOT_EVALUATED = "Not evaluated yet: this card was written while training."  # a limit, until there is a table


def _check_picture(picture: str | None) -> None:
    if picture is not None and (not picture or "/" in picture or "\\" in picture):
        raise ValueError(f"`picture={picture!r}` must be a file beside the card: give its name, without a folder.")


@dataclass(frozen=True)
class DatasetFacts:
    """A dataset that the model was trained or evaluated on.

    Args:
        name: a name for people, for instance "Sudoku 6x6".
        description: a sentence or two: where it comes from, how many rows, what is held out.
        hub_id: "namespace/name" on the Hub, if it is there.
        config, split: configuration and split of the Hub's dataset.
    """

    name: str
    description: str = ""
    hub_id: str | None = None
    config: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class TrainingFacts:
    """How the weights came about.

    Args:
        datasets: the training data.
        recipe: a sentence or two on the stages: "1,000 `masked` steps from scratch, then 400 `relay` steps."
        arguments: the arguments that matter, in the order to print; those whose value is None are left out.
        steps: optimizer steps.
        seconds: wall time of the training, or of its part since it was last resumed.
        losses: name -> loss at the end of the run, for instance that on held-out rows.
        log: step -> name -> loss while training, as many rows as the table shall have.
        parameters: number of trained parameters.
        hardware: the machine, see `hardware()`.
        versions: package -> version, see `versions()`.
        picture: name of an image file beside the card that shows the losses, see `relay_hf.pictures.training`.

    Raises:
        ValueError: a number is negative, or `picture` is not a plain file name.
    """

    datasets: Sequence[DatasetFacts] = ()
    recipe: str = ""
    arguments: Mapping[str, object] = field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    log: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    parameters: int | None = None
    hardware: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    picture: str | None = None

    def __post_init__(self) -> None:
        _check_picture(self.picture)
        for name in ("steps", "seconds", "parameters"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"`{name}={value}` of the training is no amount: give 0 or more, or leave it out.")


@dataclass(frozen=True)
class EvaluationRow:
    """One evaluated setting: what it scores and how many forwards it takes.

    Args:
        label: which model this is, usually its objective ("relay", "rollout").
        metrics: name -> fraction in [0, 1], the most important first ("exact_match": 0.797).
        denoise_forwards, commit_forwards, prefill_forwards: means per sample.
        samples: number of samples the means are over.
        threshold: unmasking threshold, if the policy has one.
        seeds: number of training seeds the means are over.
        spread: metric -> standard deviation over seeds, as a fraction.

    Raises:
        ValueError: a number is out of its range, or a spread has no metric.
    """

    label: str
    metrics: Mapping[str, float]
    denoise_forwards: float
    commit_forwards: float
    prefill_forwards: float
    samples: int
    threshold: float | None = None
    seeds: int = 1
    spread: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"evaluation row `{self.label}`"
        if not self.metrics:
            raise ValueError(f"The {where} has no metrics: give at least one, as a fraction.")
        for name, value in [*self.metrics.items(), *self.spread.items()]:
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}={value}` of the {where} is not a fraction: write 79.7 % as 0.797.")
        if unknown := sorted(set(self.spread) - set(self.metrics)):
            raise ValueError(f"The {where} has a spread of {unknown} but no such metric: give both, or neither.")
        for name in ("denoise_forwards", "commit_forwards", "prefill_forwards"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}={getattr(self, name)}` of the {where} is no mean: give 0 or more.")
        for name in ("samples", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` of the {where}: nothing was measured; give 1 or more."
                )


@dataclass(frozen=True)
class Evaluation:
    """A table of results on one dataset.

    Args:
        dataset: the evaluation data.
        rows: the table, in the order to print. All report the same metrics.
        highlighted: the row that represents this model; rows with its label are this model at other thresholds, all
            others are what it is compared with and never enter the card's metadata.
        unit: name of one sample: "puzzle", "problem".
        picture: name of an image file beside the card.
        comment: a sentence or two about the numbers.

    Raises:
        ValueError: the rows do not fit together, or `picture` is not a plain file name.
    """

    dataset: DatasetFacts
    rows: Sequence[EvaluationRow]
    highlighted: EvaluationRow
    unit: str = "sample"
    picture: str | None = None
    comment: str = ""

    def __post_init__(self) -> None:
        if self.highlighted not in self.rows:
            raise ValueError(f"`highlighted` (`{self.highlighted.label}`) is not among the rows: pass one of them.")
        if len({tuple(row.metrics) for row in self.rows}) > 1:
            raise ValueError("The evaluation rows report different metrics: give every row the same, in one order.")
        _check_picture(self.picture)

    @property
    def own_rows(self) -> list[EvaluationRow]:
        """The rows that measure this model."""
        return [row for row in self.rows if row.label == self.highlighted.label]


@dataclass(frozen=True)
class RelayCardData:
    """Everything a card says. What is left out leaves no trace in it.

    Args:
        name: name of the model.
        base_model: Hub id or folder of the checkpoint that training started from; None = there was none, or it
            is not known.
        channel: a sentence on what is carried between denoising steps and how it enters; None = nothing is carried.
        objective: short name of the training objective ("relay").
        objective_description: a sentence that says what it does.
        model: name -> value, for instance of `describe_model`.
        training: facts about the training.
        evaluations: tables of results, one per data set.
        usage: Python code that runs unchanged, for instance of `fill_in_snippet`.
        limits: sentences, one per limit.
        license: identifier that the Hub knows ("apache-2.0").
        language: ISO 639-1 codes of the text, if it is text.
        tags: beside the tags that every card gets.
        pipeline_tag: the Hub's task; "text-generation" for language models, nothing for models that fill in a canvas.
        citations: BibTeX entries.

    Raises:
        ValueError: the name is empty or more than one line, or two evaluations are on one data set.
    """

    name: str
    base_model: str | None = None
    channel: str | None = None
    objective: str = ""
    objective_description: str = ""
    model: Mapping[str, str] = field(default_factory=dict)
    training: TrainingFacts | None = None
    evaluations: Sequence[Evaluation] = ()
    usage: str = ""
    limits: Sequence[str] = ()
    license: str | None = None
    language: Sequence[str] = ()
    tags: Sequence[str] = ()
    pipeline_tag: str | None = None
    citations: Sequence[str] = (RELAY_CITATION,)

    def __post_init__(self) -> None:
        if len(self.name.strip().splitlines()) != 1:
            raise ValueError(f"`name={self.name!r}` cannot head a card: give the model a name of one line.")
        names = [evaluation.dataset.name for evaluation in self.evaluations]
        if len(set(names)) < len(names):
            raise ValueError(f"Two evaluations have one name ({', '.join(names)}): name each data set differently.")
