import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from relay_hf.tasks.sudoku import make_sudoku_tokenizer

TOKENIZER = make_sudoku_tokenizer(9)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_make_sudoku_tokenizer_vocabulary_is_pad_mask_digits(size):
    tokenizer = make_sudoku_tokenizer(size)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert tokens == ["_", ".", *map(str, range(1, size + 1))]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 1)
    assert tokenizer.model_max_length == size * size
    assert tokenizer.bos_token is tokenizer.eos_token is tokenizer.unk_token is None


@given(st.text("_.123456789"))
def test_make_sudoku_tokenizer_decode_inverts_encode(text):
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text


def test_make_sudoku_tokenizer_pads_right():
    batch = TOKENIZER(["12.", "1"], padding=True)
    assert batch["input_ids"] == [[2, 3, 1], [2, 0, 0]]
    assert batch["attention_mask"] == [[1, 1, 1], [1, 0, 0]]


def test_make_sudoku_tokenizer_skip_special_tokens_leaves_only_digits():
    assert TOKENIZER.decode(TOKENIZER.encode("1.2_3"), skip_special_tokens=True) == "123"


@pytest.mark.parametrize("text", ["0", "x", "1 2", "1\n2", "é"])
def test_make_sudoku_tokenizer_foreign_character_raises(text):
    with pytest.raises(Exception, match="UNK"):
        TOKENIZER.encode(text)


def test_make_sudoku_tokenizer_digit_of_larger_board_raises():
    with pytest.raises(Exception, match="UNK"):
        make_sudoku_tokenizer(6).encode("7")


def test_make_sudoku_tokenizer_unknown_size_raises():
    with pytest.raises(ValueError, match="`size=3`"):
        make_sudoku_tokenizer(3)


def test_make_sudoku_tokenizer_saved_and_auto_loaded_is_the_same(tmp_path):
    tokenizer = make_sudoku_tokenizer(6)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "1.6_..3"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for name in ("mask_token_id", "pad_token_id", "padding_side", "model_max_length", "unk_token", "eos_token"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
