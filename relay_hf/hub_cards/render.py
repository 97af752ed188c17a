"""Facts + `template.md` -> the text of README.md, and that text -> a file. Works offline."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import ModelCard

from .card_data import RelayCardData, TrainingFacts
from .evaluation_section import describe_dataset, describe_evaluation
from .hub_ids import link_model
from .markdown import bullets, paragraphs, sentence, table
from .metadata import make_metadata
from .snippets import describe_usage

TEMPLATE = Path(__file__).with_name("template.md")
CARD = "README.md"
PAPER_LINK = "[Relay](https://arxiv.org/abs/2605.22967)"


def save_card(data: RelayCardData, folder: str | Path) -> Path:
    """Write `data` as README.md into the folder of the model. A reader sees the old card or the new one, never a part.

    Returns: the path of the card.
    Raises: FileNotFoundError if a picture that the card shows is not in the folder.
    """
    folder = Path(folder)
    shown = [data.training.picture if data.training else None, *(evaluation.picture for evaluation in data.evaluations)]
    for picture in shown:
        if picture and not (folder / picture).is_file():
            raise FileNotFoundError(f"The card shows `{picture}`, which is not in {folder}: write the picture there.")
    folder.mkdir(parents=True, exist_ok=True)
    return write_card(render_card(data), folder)


def write_card(text: str, folder: Path) -> Path:
    """Replaces README.md at once; returns its path."""
    path, unfinished = folder / CARD, folder / f".{CARD}.{os.getpid()}"
    try:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def render_card(data: RelayCardData) -> str:
    """The text of the card: metadata block and Markdown, ending in a newline."""
    training = data.training
    card = ModelCard.from_template(
        make_metadata(data),
        template_path=str(TEMPLATE),
        card=data,
        introduction=_introduce(data),
        usage=describe_usage(data.usage) if data.usage.strip() else "",
        model=bullets(f"{name}: {value}" for name, value in data.model.items()),
        evaluations=[
            f"### {evaluation.dataset.name}\n\n{describe_evaluation(evaluation)}" for evaluation in data.evaluations
        ],
        training=_training_parts(training) if training else None,
        versions=bullets(f"{package}: {version}" for package, version in training.versions.items()) if training else "",
        limits=bullets(data.limits),
    )
    return str(card).rstrip() + "\n"


def _introduce(data: RelayCardData) -> str:
    kind = "a masked diffusion language model" + (" with a relay channel" if data.channel else "")
    origin = ""
    if data.base_model:
        origin = f", adapted from {link_model(data.base_model)}"
    elif data.training:
        origin = ", trained"
    if data.training and data.training.datasets:
        origin += f" on {_enumerate(dataset.name for dataset in data.training.datasets)}"
    if data.objective:
        origin += f" with the objective `{data.objective}`"
        if data.objective_description:
            origin += f" ({data.objective_description.strip().rstrip('.')})"
    sentences = [
        f"**{data.name}** is {kind}{origin}.",
        "It writes by denoising: it starts from masks and, in each step, runs the network once and reveals the "
        "positions it is sure of.",
    ]
    if data.channel:
        sentences.append(
            f"Between two steps it carries a learned state per token ({PAPER_LINK}): {sentence(data.channel)}"
        )
    return " ".join(sentences)


def _training_parts(training: TrainingFacts) -> dict[str, str]:
    arguments = {f"`{name}`": f"`{_value(value)}`" for name, value in training.arguments.items() if value is not None}
    run = {
        "Steps": None if training.steps is None else f"{training.steps:,}",
        "Wall time since the last start": None if training.seconds is None else _duration(training.seconds),
        "Trained parameters": None if training.parameters is None else f"{training.parameters:,}",
        "Hardware": training.hardware or None,
        **{name: f"{loss:.4g}" for name, loss in training.losses.items()},
    }
    parts = {
        "recipe": paragraphs(training.recipe),
        "datasets": bullets(describe_dataset(dataset) for dataset in training.datasets),
        "arguments": table({"Argument": [*arguments], "Value": [*arguments.values()]}),
        "run": bullets(f"{name}: {value}" for name, value in run.items() if value is not None),
        "picture": training.picture or "",
        "log": _log(training.log),
    }
    return parts if any(parts.values()) else {}


def _log(log: Mapping[int, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for losses in log.values() for name in losses))
    columns = {"Step": [f"{step:,}" for step in log]}
    for name in names:
        columns[name.capitalize()] = [f"{losses[name]:.4g}" if name in losses else "" for losses in log.values()]
    return table(columns, "---:")


def _value(value: object) -> str:
    return repr(float(value)) if isinstance(value, float) else str(value)  # float(): numpy's repr names its type


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _enumerate(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
