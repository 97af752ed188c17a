"""The tokenizer beside a checkpoint, also where the checkpoint is of a family that transformers does not know."""

from typing import Any

from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from ..modeling import RelayConfig
from ..modeling.loading_files_relay import explained, unreadable

# A tokenizer that is saved at all has one of these.
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(
    source: str, config: RelayConfig, revision: str | None = None, gguf_file: str | None = None
) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer without running code of the checkpoint.

    Without the configuration, `AutoTokenizer` reads `config.json` itself, and warns of a model type that we translate.

    Args:
        source: folder or Hub id.
        config: the checkpoint's configuration as we read it.
        revision: branch, tag or commit on the Hub.
        gguf_file: file in the source that describes the tokenizer, too.

    Returns:
        The tokenizer, or None if the checkpoint has none.

    Raises:
        OSError: the checkpoint has a tokenizer that cannot be read.
    """
    options: dict[str, Any] = {"revision": revision}
    optional = {"_raise_exceptions_for_missing_entries": False, **options}
    try:
        with explained(source, "tokenizer"):
            if gguf_file is not None:
                return AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, **options)
            if not any(cached_file(source, name, **optional) for name in TOKENIZER_FILES):
                return None
            if "auto_map" in get_tokenizer_config(source, **options):
                # Its own class, for instance Dream's, is a copy of the one of its backbone.
                options["tokenizer_type"] = config.text_config.model_type
            tokenizer = AutoTokenizer.from_pretrained(source, config=config, **options)
    except ValueError as error:  # of libraries, which name no file
        raise unreadable(source, "tokenizer", error) from error
    # The copy that is saved needs no foreign code either.
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def encode_prompt(tokenizer: Any, prompt: str, raw: bool = False) -> BatchEncoding:
    """A prompt's tokens; unless `raw`, it is a user's turn if the tokenizer has a chat template."""
    if raw or tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
