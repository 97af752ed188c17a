"""The tiny models and the tokenizer that users test their own code with."""

import pytest
import torch

from relay_hf import RelayForMaskedDiffusion, convert
from relay_hf.testing import CHAT_TEMPLATE, all_tokens_but, byte_tokenizer, tiny_decoder, tiny_model


def test_byte_tokenizer_gives_back_any_text_and_names_its_special_tokens() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenizer("tschüß\n")["input_ids"]) == "tschüß\n"
    assert tokenizer.convert_tokens_to_ids(["[EOS]", "[PAD]", "[MASK]"]) == [256, 257, 258]
    assert len(tokenizer) == 259


def test_byte_tokenizer_special_tokens_are_left_out_renamed_and_taken_from_the_bytes() -> None:
    tokenizer = byte_tokenizer(eos_token="[END]", pad_token="!", mask_token=None)
    assert (tokenizer.eos_token_id, tokenizer.mask_token, len(tokenizer)) == (256, None, 257)
    assert tokenizer.pad_token_id == tokenizer("!")["input_ids"][0]


def test_byte_tokenizer_speaks_a_chat() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    text = byte_tokenizer(chat_template=CHAT_TEMPLATE).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert text == "user: Hi\nassistant: "


def test_tiny_model_is_the_same_for_a_seed_and_another_for_another() -> None:
    ids = torch.arange(12)[None]
    first, again, other = (tiny_model(seed=seed)(ids).logits for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("channel", ["layer_norm", "residual_context", "soft_mask"])
def test_tiny_model_open_channel_changes_what_is_predicted(channel: str) -> None:
    model = tiny_model(open_channel=True, relay_channel=channel)
    ids = torch.full((1, 8), model.config.mask_token_id)
    with torch.no_grad():
        first = model(ids)
        assert not torch.equal(model(ids, relay_state=first.relay_state).logits, first.logits)


def test_tiny_model_writes_nothing_but_the_letters_left() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer, block_size=4)
    prompt = tokenizer("abc", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=8, suppress_tokens=all_tokens_but(tokenizer, "xy"))
    assert set(tokenizer.decode(output[0, 3:])) <= set("xy")


def test_tiny_decoder_becomes_a_relay_model(tmp_path) -> None:
    tokenizer = byte_tokenizer(mask_token=None)
    tiny_decoder(tokenizer, hidden_size=32).save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    convert(str(tmp_path / "decoder"), str(tmp_path / "relay"))
    model = RelayForMaskedDiffusion.from_pretrained(tmp_path / "relay")
    assert (model.config.mask_token_id, model.config.text_config.hidden_size) == (258, 32)
