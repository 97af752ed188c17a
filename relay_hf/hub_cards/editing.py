"""Changes to a card that is there already: what people wrote into it stays."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .card_data import NOT_EVALUATED, Evaluation
from .evaluation_section import describe_evaluation
from .hub_ids import is_hub_id
from .markdown import bullets, get_section, set_section
from .metadata import OWN_TAG, make_results
from .render import CARD, write_card
from .snippets import describe_usage, loaded_models, quote, say_where_code_is

USAGE, EVALUATION, LIMITS = "## How to use", "## Evaluation", "## Limits"
# What follows in the template: new sections go before the first of these that a card has.
BEHIND_EVALUATION = ("## Model", "## Training", LIMITS, "## Citation", "## Framework versions")
BEHIND_USAGE = (EVALUATION, *BEHIND_EVALUATION)
CODE_FILE = "modeling_relay.py"  # `push` puts it, and what it imports, beside the weights
# Words of the cards that libraries write unasked, until a person fills them in.
UNFILLED = ("# Model Card for Model ID", "[More Information Needed]")


def has_card(folder: Path) -> bool:
    """Whether a folder has a card that says something; those that libraries write unasked do not."""
    path = folder / CARD
    return path.is_file() and not all(words in _text(path) for words in UNFILLED)


def read_card(folder: Path) -> Any:
    """The card of a folder, a `ModelCard` (Any: its metadata are typed as those of all kinds of cards).

    Raises:
        FileNotFoundError: the folder has no card.
        ValueError: the card's metadata cannot be read.
    """
    text = _text(folder / CARD)
    try:
        return ModelCard(text)
    except Exception as error:  # of the YAML library as well
        problem = " ".join(str(error).split())
        raise ValueError(f"The metadata of `{CARD}` cannot be read ({problem}): correct it.") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` is no text ({error}): correct or remove it.") from error


def add_evaluation(folder: str | Path, evaluation: Evaluation) -> Path:
    """Writes a table of results into the card of a model: a section on its data set, and the card's `model-index`.

    Results on the same data set are replaced; everything else stays.

    Args:
        folder: the folder of the model, with its card.
        evaluation: the results; their picture is in the folder.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: the folder has no card, or not the picture.
        ValueError: the card's metadata cannot be read.
    """
    folder = Path(folder)
    if evaluation.picture and not (folder / evaluation.picture).is_file():
        raise FileNotFoundError(f"`{evaluation.picture}` is not in {folder}: write the picture there.")
    card = read_card(folder)
    heading = f"### {evaluation.dataset.name}"
    section = set_section(get_section(card.text, EVALUATION), heading, describe_evaluation(evaluation))
    text = set_section(card.text, EVALUATION, section, before=BEHIND_EVALUATION)
    limits = [line for line in get_section(text, LIMITS).splitlines() if line != bullets([NOT_EVALUATED])]
    card.text = set_section(text, LIMITS, "\n".join(limits))
    data = card.data
    earlier = [result for result in data.eval_results or [] if result.dataset_name != evaluation.dataset.name]
    data.eval_results = [*earlier, *make_results(evaluation, data.pipeline_tag)]
    data.model_name = data.model_name or folder.resolve().name
    return _write(card, folder)


def set_usage(folder: Path, model_id: str, snippet: str, earlier_id: str | None = None) -> None:
    """Makes the code of a card load the model from where it will be.

    A card that has no such code gets it, if it is one of ours. In one that has, names of the folder are replaced: of
    the one that the model is in, and of that which our code names, where the model may have been before.

    Args:
        folder: the folder of the card.
        model_id: Hub id, or the folder where the model stays.
        snippet: code for it; "" if there is none.
        earlier_id: the folder that the model is in.
    """
    card = read_card(folder)
    before = usage = get_section(card.text, USAGE)
    if usage:
        for place in {earlier_id, *loaded_models(usage)}:
            if place is not None and not is_hub_id(place):
                usage = usage.replace(quote(place), quote(model_id))
    elif OWN_TAG in (card.data.tags or []) and snippet:
        usage = describe_usage(snippet)
    usage = say_where_code_is(usage, in_repository=(folder / CODE_FILE).is_file())
    if usage != before:
        card.text = set_section(card.text, USAGE, usage, before=BEHIND_USAGE)
        _write(card, folder)


def _write(card: Any, folder: Path) -> Path:
    card.text = f"\n{card.text.lstrip()}"  # a blank line behind the metadata
    return write_card(str(card), folder)
