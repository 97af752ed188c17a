"""Four families' own samplers, row by row: tokens, forwards and logits of their model classes on tiny weights."""

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import logging

from .family_samplers import FAMILIES, FOLDER, load, read_samples

SAMPLES = read_samples()
# Where SDAR is wrong: it writes over known tokens, or takes what torch.topk makes of a tie.
RIGHT = {"low_confidence_static, greedy": 11, "low_confidence_static, topk1": 0, "low_confidence_dynamic, greedy": 27}


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_family_same_logits(family: str) -> None:
    """Theirs are in the order of the network: entry i of a token-shift model scores token i + 1."""
    vectors, model = load_file(FOLDER / family / "forward.safetensors"), load(family)
    ours = model(vectors["input_ids"]).logits
    theirs = vectors["raw_logits"]
    if model.config.token_shift:
        ours, theirs = ours[:, 1:], theirs[:, :-1]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("family", "sampler"), sorted({(sample.family, sample.sampler) for sample in SAMPLES}))
def test_family_sampler_same_tokens_and_forwards(family: str, sampler: str) -> None:
    samples = [sample for sample in SAMPLES if (sample.family, sample.sampler) == (family, sampler)]
    right = [sample for sample in samples if sample.is_right()]
    assert [sample.case for sample in right if not sample.is_equal()] == []
    assert len(right) == RIGHT.get(sampler, len(samples))
