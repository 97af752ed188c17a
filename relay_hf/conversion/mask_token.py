"""Which id becomes [MASK], and the row of the embeddings that it needs."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..modeling import RelayForMaskedDiffusion

# As Fast-dLLM v2 calls it.
NEW_MASK_TOKEN = "|<MASK>|"


@dataclass
class MaskToken:
    """A choice of [MASK]: its id, and in words where it comes from."""

    token_id: int
    origin: str


def choose_mask_token(
    given: int | None, of_family: int | None, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> MaskToken:
    """Takes the id that was given, else the family's, else the tokenizer's own, else one that nothing uses yet.

    The tokenizer is changed to call that id its mask token.

    Args:
        given: id that the user wants.
        of_family: id that the source's configuration names.
        tokenizer: the source's.
        vocab_size: rows of its embeddings; the tokenizer may use fewer.

    Raises:
        ValueError: no id is known, or the id is another token already.
    """
    known, origin = (given, "as given") if given is not None else (of_family, "the source's own")
    if known is not None and not 0 <= known < vocab_size:
        raise ValueError(
            f"`mask_token_id={known}` is outside the embeddings of {vocab_size} tokens: leave it out, and `convert` "
            "adds a row for a new [MASK]; or give the id of a token that no text uses."
        )
    if tokenizer is None:
        if known is None:
            raise ValueError(
                "The source has no tokenizer to find an unused id in: pass `mask_token_id`, or save one there."
            )
        return MaskToken(known, f"{origin}; there is no tokenizer")
    if known is not None:
        named = _name_mask_token(tokenizer, known)
        return MaskToken(known, origin if named else f"{origin}; the tokenizer has no such token")
    origin = f"`{tokenizer.mask_token}` of the tokenizer"
    if tokenizer.mask_token_id is None:
        taken, origin = set(tokenizer.get_vocab().values()), f"`{NEW_MASK_TOKEN}`"
        tokenizer.add_special_tokens({"mask_token": NEW_MASK_TOKEN})
        if tokenizer.mask_token_id in taken:
            raise ValueError(
                f"The tokenizer gives a new token the id {tokenizer.mask_token_id}, which another has, because its ids "
                "have gaps: pass `mask_token_id`."
            )
        if tokenizer.mask_token_id < vocab_size:
            origin += ", on an unused row of the embeddings"
    if tokenizer.mask_token_id >= vocab_size:
        origin += ", on a new row of the embeddings"
    return MaskToken(tokenizer.mask_token_id, origin)


def _name_mask_token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """Makes the tokenizer call this id its mask token; returns whether that is possible."""
    for name in ("pad_token", "eos_token", "bos_token"):
        if getattr(tokenizer, f"{name}_id") == token_id:
            raise ValueError(
                f"`mask_token_id={token_id}` is the tokenizer's `{name}`, which text uses: choose another id, or leave "
                "it out."
            )
    if tokenizer.mask_token_id == token_id:
        return True
    if token_id > len(tokenizer):
        return False  # it would call the next free id so
    known = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
    tokenizer.add_special_tokens({"mask_token": known or NEW_MASK_TOKEN})
    return True


@torch.no_grad()
def add_rows(model: RelayForMaskedDiffusion, count: int) -> list[str]:
    """Enlarges embeddings and head to `count` tokens; a new row is the mean of the old ones.

    Returns:
        The parameters that have new rows, in words.
    """
    old = model.get_input_embeddings().num_embeddings
    # The library's own choice is to draw rows around that mean: two conversions would differ.
    model.resize_token_embeddings(count, mean_resizing=False)
    modules: dict[str, nn.Module] = {"embeddings": model.get_input_embeddings()}
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        modules["head"] = model.lm_head
    for module in modules.values():
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        weight[old:] = weight[:old].float().mean(0).to(weight.dtype)
    return [f"rows {old} to {count - 1} of the {name}, as the mean of the others" for name in modules]
