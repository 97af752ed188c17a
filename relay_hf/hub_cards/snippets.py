"""Code for the card's "How to use" section. `tests/hub_cards/test_card_snippets.py` runs it."""

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..modeling import RelayConfig

# Remarks on the import. `push` puts the model's code into the repository; a folder has none.
_CODE_IN_REPOSITORY = "or, without the package, pass trust_remote_code=True below: the code is in the repository"
_NO_CODE = "`relay-hf push FOLDER OWNER/NAME` uploads the code as well, for readers without the package"
_LOAD = f"""\
import relay_hf  # {_NO_CODE}
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained({{model}})
tokenizer = AutoTokenizer.from_pretrained({{model}})
"""
_LOADED = re.compile(r'^model = AutoModel\.from_pretrained\(("(?:[^"\\]|\\.)*")\)$', re.M)


def fill_in_snippet(model_id: str, canvas: str, threshold: float | None = None) -> str:
    """Load a model that fills in a canvas (`block_size=None`), and fill one in.

    Args:
        model_id: Hub id or folder that the reader will load, with its tokenizer.
        canvas: text with masks in it, for instance a Sudoku whose blanks are ".".
        threshold: unmasking threshold; None = the one of the model's generation config.
    """
    option = "" if threshold is None else f", unmasking_threshold={float(threshold)!r}"
    return f"""\
{_LOAD.format(model=quote(model_id))}
inputs = tokenizer({quote(canvas)}, return_tensors="pt")
output = model.generate(inputs["input_ids"]{option}, return_dict_in_generate=True)
print(tokenizer.decode(output.sequences[0]))
print("denoise forwards:", int(output.denoise_forwards[0]))
"""


def generate_snippet(model_id: str, prompt: str = "The capital of France is") -> str:
    """Load a language model and continue a prompt.

    Args:
        model_id: Hub id or folder that the reader will load, with its tokenizer.
        prompt: text to continue.
    """
    return f"""\
{_LOAD.format(model=quote(model_id))}
prompt = tokenizer({quote(prompt)}, return_tensors="pt")
output = model.generate(**prompt, max_new_tokens=64, return_dict_in_generate=True)
print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
print("denoise forwards:", int(output.denoise_forwards[0]))
"""


def chat_snippet(model_id: str, question: str = "Write a Python function that reverses a string.") -> str:
    """Load a language model with a chat template and ask it something.

    Args:
        model_id: Hub id or folder that the reader will load, with its tokenizer.
        question: the user's message.
    """
    return f"""\
{_LOAD.format(model=quote(model_id))}
messages = [{{"role": "user", "content": {quote(question)}}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**prompt, max_new_tokens=256, return_dict_in_generate=True)
print(tokenizer.decode(output.sequences[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
print("denoise forwards:", int(output.denoise_forwards[0]))
"""


def usage_snippet(model_id: str, config: "RelayConfig", tokenizer: "PreTrainedTokenizerBase") -> str:
    """The code that fits a model; "" for a model without blocks, whose canvas is not known.

    Args:
        model_id: Hub id or folder that the reader will load, with its tokenizer.
        config, tokenizer: the model's configuration and tokenizer.
    """
    if config.block_size is None:
        return ""
    return generate_snippet(model_id) if tokenizer.chat_template is None else chat_snippet(model_id)


def loaded_models(code: str) -> set[str]:
    """What the code of these snippets loads, in code that may hold more."""
    return {json.loads(name) for name in _LOADED.findall(code)}


def say_where_code_is(usage: str, in_repository: bool) -> str:
    """The text with the remark of these snippets that is true: whether the code of the model is beside its weights."""
    remarks = _NO_CODE, _CODE_IN_REPOSITORY
    return usage.replace(remarks[not in_repository], remarks[in_repository])


def describe_usage(snippet: str) -> str:
    """The body of the section "How to use"."""
    return f"With the package `relay_hf` installed:\n\n```python\n{snippet.strip()}\n```"


def quote(text: str) -> str:
    """The text as Python writes it in double quotes."""
    return json.dumps(text, ensure_ascii=False)
