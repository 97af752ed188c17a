"""What both kinds of evaluations need to enter the card of the model that was evaluated."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_loading import read_config, read_tokenizer
from ..hub_cards import CARD, EvaluationRow, plain_card, save_card, usage_snippet
from ..modeling import RelayForMaskedDiffusion


def hash_weights(model: RelayForMaskedDiffusion) -> str:
    """Differs if a weight does; the name of a checkpoint may stay while it is trained on."""
    hashes = {name: torch.hash_tensor(weights).item() for name, weights in model.state_dict().items()}
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def load_evaluated(folder: Path, weights: str | None, dtype: str, run: Path) -> RelayForMaskedDiffusion:
    """Loads a model, whose weights must be those that were evaluated.

    Args:
        folder: of the model.
        weights: their hash, in `dtype`.
        dtype: "torch.float32" or the like.
        run: the evaluation, for messages.

    Raises:
        OSError: there is no model.
        ValueError: its weights are others.
    """
    read_config(str(folder))
    model = RelayForMaskedDiffusion.from_pretrained(folder, dtype=dtype.removeprefix("torch."))
    if hash_weights(model) != weights:
        raise ValueError(f"`{run}` evaluated other weights than those in `{folder}`: evaluate this model.")
    return model


def ensure_card(folder: Path, model: Any) -> None:
    """Writes a plain card if the folder of the model has none."""
    if not (folder / CARD).exists():
        place = folder.resolve()
        usage = usage_snippet(str(place), model.config, read_tokenizer(str(place), model.config))
        save_card(plain_card(place.name, model.config, usage), folder)


def row_of_threshold(rows: list[EvaluationRow], threshold: float) -> EvaluationRow:
    """That of the model's own threshold; without it the highest, never the one that happens to score best."""
    found = {row.threshold: row for row in rows}
    return found.get(threshold) or max(rows, key=lambda row: row.threshold or 0)
