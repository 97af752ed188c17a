"""The published reference, token by token: block decoding, in every case its README calls comparable."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from relay_hf import RelayForMaskedDiffusion, RelayGenerateOutput


@pytest.fixture(scope="module")
def model(reference: Path) -> RelayForMaskedDiffusion:
    return RelayForMaskedDiffusion.from_pretrained(reference / "checkpoint")


def end_of_blocks(length: int, case: dict[str, Any], block_size: int) -> int:
    """Where the last new block of a row ends, counted from the block that its prompt ends in."""
    return (length // block_size + case["max_blocks_new"]) * block_size


def decode(
    model: RelayForMaskedDiffusion, index: dict, vectors: dict, case: dict, side: str = "left", **options: Any
) -> tuple[list[Tensor], RelayGenerateOutput]:
    """Decodes the case as one batch, padded on one side; returns each row without its padding, and the output."""
    settings = index["config"]
    prompts = [vectors[f"{case['key']}.prompt{row}"] for row in range(len(case["lengths"]))]
    padding = {"batch_first": True, "padding_side": side}
    ids = torch.nn.utils.rnn.pad_sequence(prompts, padding_value=settings["pad_token_id"], **padding)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(prompt) for prompt in prompts], **padding)
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max(end_of_blocks(len(p), case, settings["block_size"]) - len(p) for p in prompts),
        sub_block_size=settings["sub_block_size"],
        unmasking_threshold=case["threshold"],
        use_relay=case["relay"],
        eos_token_id=case["stop_token_id"],
        pad_token_id=settings["pad_token_id"],
        return_dict_in_generate=True,
        **options,
    )
    new = output.sequences[:, ids.shape[1] :]
    return [torch.cat([prompt, new[row]]) for row, prompt in enumerate(prompts)], output


def comparable_end(row: Tensor, length: int, case: dict, block_size: int) -> int:
    """The reference's row counts up to its stop token, and up to the end of its last new block."""
    end = min(len(row), end_of_blocks(length, case, block_size))
    stops = (row[length:end] == case["stop_token_id"]).nonzero() if case["stop_token_id"] is not None else []
    return length + int(stops[0]) + 1 if len(stops) else end


def test_generate_of_the_reference_same_tokens(
    model: RelayForMaskedDiffusion, reference_index: dict, reference_vectors: dict, decode_case: dict
) -> None:
    ours, _ = decode(model, reference_index, reference_vectors, decode_case)
    for row, length in enumerate(decode_case["lengths"]):
        expected = reference_vectors[f"{decode_case['key']}.row{row}"]
        end = comparable_end(expected, length, decode_case, reference_index["config"]["block_size"])
        assert ours[row][:end].tolist() == expected[:end].tolist()


def test_generate_of_the_reference_padded_on_the_right_same_as_left(
    model: RelayForMaskedDiffusion, reference_index: dict, reference_vectors: dict, ragged_case: dict
) -> None:
    left, right = (
        decode(model, reference_index, reference_vectors, ragged_case, side)[0] for side in ("left", "right")
    )
    assert all(map(torch.equal, left, right))


def test_generate_of_the_reference_same_denoise_forwards(
    model: RelayForMaskedDiffusion, reference_index: dict, reference_vectors: dict, counted_case: dict
) -> None:
    _, output = decode(model, reference_index, reference_vectors, counted_case)
    assert output.denoise_forwards.tolist() == counted_case["denoising_nfe"]


def test_generate_of_the_reference_relay_matters(reference_index: dict, reference_vectors: dict) -> None:
    """Else the tests above could pass with a state that is never carried."""
    texts: dict[tuple, dict[bool, list[int]]] = {}
    for case in reference_index["cases"]:
        if len(case["lengths"]) == 1 and case["stop_token_id"] is None:
            prompt, row = (reference_vectors[f"{case['key']}.{name}0"].tolist() for name in ("prompt", "row"))
            texts.setdefault((*prompt, case["threshold"]), {})[case["relay"]] = row
    pairs = [rows for rows in texts.values() if len(rows) == 2]
    if not pairs:
        pytest.skip("this set decodes no prompt both with and without the relay")
    assert any(rows[True] != rows[False] for rows in pairs)
