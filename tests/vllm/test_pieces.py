"""Parts of the plug-in that need no vLLM: the cut into blocks, versions, and what is imported."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_hf.vllm.attention import cut_into_blocks
from relay_hf.vllm.versions import check_known


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 4)), min_size=1, max_size=6),
    st.sampled_from([1, 4, 8]),
)
def test_every_token_sees_all_before_the_end_of_its_block(requests: list[tuple[int, int]], size: int) -> None:
    """Each request has some tokens, behind some blocks that are computed."""
    lengths = np.array([length for length, _ in requests])
    begins = np.array([blocks * size for _, blocks in requests])
    pieces = cut_into_blocks(lengths, begins + lengths, size)
    token = 0
    for row, (length, begin) in enumerate(zip(lengths, begins, strict=True)):
        for position in range(begin, begin + length):
            piece = int(np.searchsorted(pieces.starts, token, side="right")) - 1
            assert pieces.rows[piece] == row
            assert pieces.ends[piece] == min((position // size + 1) * size, begin + length)
            token += 1
    assert pieces.starts[-1] == token == lengths.sum()


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "dev"])
def test_unknown_version_is_refused_in_a_sentence(version: str) -> None:
    with pytest.raises(ImportError, match=rf"vLLM {version} is installed, but relay_hf serves with vLLM >= 0.32 and <"):
        check_known(version)


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1rc2", "0.33.0+cpu"])
def test_known_version_is_taken(version: str) -> None:
    check_known(version)


def test_importing_the_plug_in_imports_no_vllm_and_no_trainer() -> None:
    code = "import sys, relay_hf.vllm; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "relay_hf.vllm" in names
    assert not {"vllm", "torch", "transformers", "trl", "peft", "datasets"} & set(names)


def test_options_of_requests_import_no_trainer() -> None:
    """What a server imports of ours beside vLLM."""
    code = "import sys, relay_hf.vllm.options, relay_hf.loading.checkpoint; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "relay_hf.vllm.options" in names
    assert not {"trl", "peft", "datasets"} & set(names)
