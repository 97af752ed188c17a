"""`pipeline("text-generation")` with a relay model, found by its Auto class: the same texts as `generate`."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, Pipeline, PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

from relay_hf.testing import CHAT_TEMPLATE, all_tokens_but

CHAT = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "abc"}, {"role": "user", "content": "So?"}]
PROMPTS = ["Once", "A longer prompt", "Once upon a time there"]


@pytest.fixture
def writer(make_model: Callable, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Pipeline:
    """A saved model that says a, b, c and spaces, greedily as its `generation_config.json` says, and its tokenizer."""
    text = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model = make_model(open_channel=True, token_shift=True, text=text, mask_token_id=tokenizer.mask_token_id)
    model.generation_config.update(
        do_sample=False,
        max_new_tokens=20,
        suppress_tokens=all_tokens_but(tokenizer, "abc "),
        unmasking_threshold=0.4,
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # Not the fixture's own, which the pipeline would change: it pads on the left.
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.chat_template = CHAT_TEMPLATE
    return pipeline("text-generation", model=str(tmp_path), tokenizer=loaded, device="cpu")


def generated(writer: Pipeline, prompt: str, **options: Any) -> str:
    """The new text of `generate` itself."""
    inputs = writer.tokenizer(prompt, return_tensors="pt")
    sequence = writer.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return writer.tokenizer.decode(sequence, skip_special_tokens=True)


def test_pipeline_prompt_equals_generate(writer: Pipeline) -> None:
    new = generated(writer, "Once")
    assert len(new) == 20
    assert writer("Once") == [{"generated_text": "Once" + new}]
    assert writer("Once", return_full_text=False) == [{"generated_text": new}]


def test_pipeline_chat_equals_generate(writer: Pipeline) -> None:
    prompt = writer.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    reply = {"role": "assistant", "content": generated(writer, prompt)}
    assert writer(CHAT) == [{"generated_text": [*CHAT, reply]}]


def test_pipeline_batch_equals_each_alone(writer: Pipeline) -> None:
    batch = writer(PROMPTS, batch_size=3, return_full_text=False)
    assert batch == [[{"generated_text": generated(writer, prompt)}] for prompt in PROMPTS]


def test_pipeline_takes_relay_options(writer: Pipeline) -> None:
    options = {"unmasking_threshold": 0.0, "use_relay": False, "sub_block_size": None, "max_new_tokens": 12}
    new = generated(writer, "Once", **options)
    assert writer("Once", return_full_text=False, **options) == [{"generated_text": new}]
    assert new != generated(writer, "Once", max_new_tokens=12)


def test_pipeline_streams_block_by_block(writer: Pipeline) -> None:
    """Blocks of 8 behind a prompt of 4: text comes when 4, 12 and 20 tokens are known, and at the end."""
    streamer = TextIteratorStreamer(writer.tokenizer, skip_prompt=True, timeout=60)
    new = generated(writer, "Once")
    thread = threading.Thread(target=writer, args=("Once",), kwargs={"streamer": streamer}, daemon=True)
    thread.start()
    pieces = list(streamer)
    thread.join(60)
    # The streamer may hold a word back until a space ends it.
    shown = list(itertools.accumulate(map(len, pieces)))
    known = [4, 12, 20, len(new)]
    words_end = [*(new.rfind(" ", 0, count) + 1 for count in known[:-1]), len(new)]
    assert all(least <= count <= most for least, count, most in zip(words_end, shown, known, strict=True))
    assert "".join(pieces) == new
    assert sum(map(bool, pieces)) > 1
