"""Small models, a byte tokenizer and the published numbers; everything offline and seeded."""

import os

# Read when the libraries are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# For the processes that tests start; this one is limited below.
os.environ["OMP_NUM_THREADS"] = "1"

import functools
import gc
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.flex_attention as their_flex
import transformers.masking_utils as their_masks
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import PreTrainedTokenizerFast, Qwen2Config

from relay_hf import RelayForMaskedDiffusion
from relay_hf.testing import byte_tokenizer, tiny_model
from relay_hf.testing import tiny_text_config as text_config

# Tiny tensors: a second thread gains nothing, and on a busy machine waiting for it costs a hundredfold.
torch.set_num_threads(1)

# The same examples in every run, however slow the machine.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

REFERENCE = Path(os.environ.get("RELAY_HF_REFERENCE", Path(__file__).parent / "reference"))
VOCAB_SIZE, MASK = 64, 63


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: they take long, and none is to be left over for one worker at the end."""
    items.sort(key=lambda item: not hasattr(getattr(item, "module", None), "subprocess"))


def pytest_collection_finish() -> None:
    """Spares what libraries and tests have made so far: at its end, every trainer looks for garbage in all there is."""
    gc.freeze()


@pytest.fixture(name="tiny_text_config")
def fixture_of_text_config() -> Qwen2Config:
    return text_config()


@pytest.fixture
def make_model() -> Callable[..., RelayForMaskedDiffusion]:
    """Builds seeded models in eval mode: `relay_hf.testing.tiny_model`."""
    return tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then [EOS], [PAD] and [MASK]: 259 tokens."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder with the numbers of the published reference; `RELAY_HF_REFERENCE` points to another set."""
    return REFERENCE


@pytest.fixture(scope="session")
def reference_index() -> dict[str, Any]:
    return json.loads((REFERENCE / "vectors.json").read_text())


@pytest.fixture(scope="session")
def reference_vectors() -> dict[str, Tensor]:
    return load_file(REFERENCE / "vectors.safetensors")


@functools.cache
def reference_cases() -> dict[str, list[Any]]:
    """What the reference folder lists, as far as its README calls it comparable."""
    index = json.loads((REFERENCE / "vectors.json").read_text())
    # A batch with the relay is not: there a row depends on its neighbours.
    decode = [case for case in index["cases"] if not case["relay"] or len(case["lengths"]) == 1]
    ragged = [case for case in decode if len(set(case["lengths"])) > 1]
    # Nor are counts, where the reference counts other forwards.
    counted = [case for case in decode if case["stop_token_id"] is None and case not in ragged]
    return {"forward_case": index["forward"], "decode_case": decode, "ragged_case": ragged, "counted_case": counted}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that takes, say, a `decode_case` once for each of them."""
    for name in [name for name in metafunc.fixturenames if name.endswith("_case")]:
        ids = [case if isinstance(case, str) else case["key"] for case in reference_cases()[name]]
        metafunc.parametrize(name, reference_cases()[name], ids=ids)


@pytest.fixture
def plain_flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flex attention as torch computes it without a compiler."""
    monkeypatch.setattr(
        their_masks, "create_block_mask", lambda *a, **k: create_block_mask(*a, **{**k, "_compile": False})
    )
    monkeypatch.setattr(
        their_flex, "compile_friendly_flex_attention", lambda q, k, v, training=False, **o: flex_attention(q, k, v, **o)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield
