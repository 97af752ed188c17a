"""A tokenizer that reads a Sudoku board one character at a time.

The blank of a puzzle, ".", is the mask token itself: a tokenized question is already the partly masked sequence that a
masked diffusion model completes, and the answer is the same sequence with nothing masked.
"""

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from .board import BoardShape

PAD_TOKEN = "_"
MASK_TOKEN = "."


def make_sudoku_tokenizer(size: int = 9) -> PreTrainedTokenizerFast:
    """The tokenizer of `size` x `size` boards: "_" (pad) = 0, "." (mask and blank) = 1, then the digits "1" = 2, ...

    No other token is added around a board. A character outside the vocabulary makes encoding raise (there is no unknown
    token), so write blanks as ".", not "0". Decoding puts no spaces between the cells; with `skip_special_tokens=True`
    it leaves the blanks out too.

    Raises: ValueError if the size is not 4, 6 or 9.
    """
    shape = BoardShape.of_size(size)
    characters = [PAD_TOKEN, MASK_TOKEN, *(str(digit) for digit in range(1, size + 1))]
    backend = Tokenizer(WordLevel({character: index for index, character in enumerate(characters)}))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        mask_token=MASK_TOKEN,
        padding_side="right",
        model_max_length=shape.cells,
        clean_up_tokenization_spaces=False,
    )
