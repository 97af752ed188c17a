"""Parts of the plug-in that need no vLLM: the cut into blocks, versions, and what is imported."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from relay_hf import RelayConfig
from relay_hf.modeling.generation_candidates_relay import Texts, find_candidates, progress_before
from relay_hf.modeling.generation_options_relay import complete_generation_config
from relay_hf.modeling.unmasking_relay import Progress
from relay_hf.testing import tiny_text_config
from relay_hf.vllm.attention import cut_into_blocks
from relay_hf.vllm.options import OptionReader
from relay_hf.vllm.versions import check_known

MASK, SIZE = 63, 8


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


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from([1, 2, 4, 8])), min_size=1, max_size=5))
def test_rows_of_different_sub_blocks_and_stop_tokens_are_those_alone(rows: list[tuple[int, int]]) -> None:
    """The functions of the block decoder, given one number for each row where `generate` gives one for all."""
    generator = torch.Generator().manual_seed(sum(seed for seed, _ in rows))
    count = len(rows)
    tokens = torch.randint(0, 9, (count, SIZE), generator=generator)
    tokens = torch.where(torch.rand(count, SIZE, generator=generator) < 0.6, MASK, tokens)
    prompt_end = torch.randint(0, SIZE, (count,), generator=generator)
    end = torch.randint(SIZE // 2, 2 * SIZE, (count,), generator=generator)
    stops = torch.randint(0, 9, (count, 1, 2), generator=generator)
    sizes = torch.tensor([size for _, size in rows])
    zeros = torch.zeros(count, dtype=torch.long)
    texts = Texts(tokens, torch.ones_like(tokens, dtype=torch.bool), prompt_end, end, zeros)
    done = Progress(torch.randint(0, 3, (count,), generator=generator), sizes)
    together = find_candidates(texts, stops, sizes, MASK)
    progress = progress_before(done, zeros, together, sizes, is_canvas=False)
    for row, (_, size) in enumerate(rows):
        one = slice(row, row + 1)
        alone = find_candidates(Texts(*(each[one] for each in texts)), stops[row, 0], size, MASK)
        assert all(torch.equal(mine[one], theirs) for mine, theirs in zip(together, alone, strict=True))
        before = progress_before(Progress(*(each[one] for each in done)), zeros[one], alone, size, is_canvas=False)
        assert all(torch.equal(mine[one], theirs) for mine, theirs in zip(progress, before, strict=True))


def make_reader(**defaults: object) -> OptionReader:
    config = RelayConfig(text_config=tiny_text_config(), block_size=SIZE, mask_token_id=MASK)
    options = GenerationConfig(**defaults)
    complete_generation_config(config, options)
    return OptionReader(config, options)


def test_defaults_that_are_not_there_are_named_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    reader = make_reader(fuse_commits=True)
    assert "`fuse_commits=True` in `generation_config.json` is not used, because vLLM commits" in caplog.text
    assert reader.read({}).decoding.fuse_commits is False
    with pytest.raises(ValueError, match=r"`relay_start='self'` in `generation_config\.json` is not"):
        make_reader(relay_start="self")


def test_requests_of_equal_options_share_a_key_whatever_their_seeds() -> None:
    reader = make_reader(do_sample=True)
    first, second, other = (
        reader.read(given)
        for given in ({"sampling_seeds": [1]}, {"sampling_seeds": 2}, {"sampling_seeds": [1], "temperature": 0.5})
    )
    assert first.key == second.key != other.key
    assert (first.seed, second.seed, reader.read({}).seed) == (1, 2, None)


def test_canvas_length_is_the_block_size() -> None:
    """By this name vLLM knows that a model denoises; it is not saved."""
    config = RelayConfig(text_config=tiny_text_config(), block_size=SIZE, mask_token_id=MASK)
    assert config.canvas_length == SIZE
    assert "canvas_length" not in config.to_dict()


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
