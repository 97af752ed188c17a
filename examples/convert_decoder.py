"""Makes a relay model of a causal decoder, with a fresh channel, and reads it back.

python examples/convert_decoder.py                                         # a tiny random decoder: seconds
python examples/convert_decoder.py --source Qwen/Qwen2.5-0.5B --output qwen-relay
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

from relay_hf import convert
from relay_hf.testing import byte_tokenizer, tiny_decoder

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--source", help="folder or id of a causal decoder, Fast-dLLM v2, SDAR, LLaDA or Dream")
parser.add_argument("--output", help="folder for the relay model")
arguments = parser.parse_args()


def tiny_source(folder: Path) -> str:
    """A random decoder of two layers and a tokenizer with one token a byte, and no mask token."""
    tokenizer = byte_tokenizer(mask_token=None)
    tiny_decoder(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


with tempfile.TemporaryDirectory() as scratch:
    source = arguments.source or tiny_source(Path(scratch) / "source")
    output = arguments.output or str(Path(scratch) / "relay")
    print(convert(source, output))
    model, tokenizer = AutoModel.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
    print("generated:", tokenizer.decode(tokens))
