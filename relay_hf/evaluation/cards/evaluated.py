"""What both kinds of cards share: the model with the weights that were evaluated, and a card to write into."""

from pathlib import Path

from ...hub_cards import EvaluationRow, has_card, plain_card, save_card, usage_snippet
from ...loading.checkpoint import read_config, read_tokenizer
from ...modeling import RelayForMaskedDiffusion
from ...modeling.loading_adapters_relay import ADAPTER_BASE_FIELD
from ..weights import hash_weights


def load_evaluated(folder: Path, weights: str | None, dtype: str, run: Path) -> RelayForMaskedDiffusion:
    """Loads a model, whose weights must be those that were evaluated.

    Args:
        folder: the folder of the model.
        weights: the hash of its weights, in `dtype`.
        dtype: "torch.float32" or the like.
        run: the evaluation, for messages.

    Raises:
        OSError: the folder holds no model.
        ValueError: its weights are not those that were evaluated.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`{folder}` is no folder: give that of the model whose card shall be written.")
    read_config(str(folder))  # raises one sentence if the model cannot be read
    model = RelayForMaskedDiffusion.from_pretrained(folder, dtype=dtype.removeprefix("torch."))
    if hash_weights(model) != weights:
        raise ValueError(f"`{run}` evaluated other weights than those in `{folder}`: evaluate this model.")
    return model


def ensure_card(folder: Path) -> None:
    """Writes a plain card if the folder of a model has none, or an empty form."""
    if has_card(folder):
        return
    place = str(folder.resolve())
    config = read_config(place)
    usage = usage_snippet(place, config, read_tokenizer(place, config))
    base = getattr(config, ADAPTER_BASE_FIELD, None)
    save_card(plain_card(Path(place).name, config, usage, base), folder)


def row_of_threshold(rows: list[EvaluationRow], threshold: float) -> EvaluationRow:
    """That of the model's own threshold; without it the highest, never the one that happens to score best."""
    found = {row.threshold: row for row in rows}
    return found.get(threshold) or max(rows, key=lambda row: row.threshold or 0)
