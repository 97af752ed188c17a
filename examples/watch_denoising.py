"""Watches a text being written, step by step: in the terminal, and as a picture.

python examples/watch_denoising.py                             # a tiny random model: fast, and nonsense
python examples/watch_denoising.py --output denoising.png      # with the picture
python examples/watch_denoising.py --model PATH_OR_ID          # yours, with its tokenizer
"""

import argparse

from transformers import AutoModel, AutoTokenizer

from relay_hf import plot_denoising, show_denoising
from relay_hf.testing import all_tokens_but, byte_tokenizer, tiny_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="checkpoint to load")
parser.add_argument("--prompt", default="Why is the sky blue?")
parser.add_argument("--max-new-tokens", type=int, default=40)
parser.add_argument("--threshold", type=float, help="unmasking threshold of the model's policy")
parser.add_argument("--output", help="PNG file for the picture")
parser.add_argument("--color-by", default="step", choices=["step", "confidence"])
arguments = parser.parse_args()

options = {} if arguments.threshold is None else {"unmasking_threshold": arguments.threshold}
if arguments.model:
    model, tokenizer = AutoModel.from_pretrained(arguments.model), AutoTokenizer.from_pretrained(arguments.model)
else:
    # A random model is never sure, so the threshold is low and letters are all it may say.
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer, block_size=16, token_shift=True)
    suppressed = all_tokens_but(tokenizer, "abcdefghijklmnopqrstuvwxyz ")
    options = {"unmasking_threshold": 0.25, "sub_block_size": 8, "suppress_tokens": suppressed} | options

input_ids = tokenizer(arguments.prompt, return_tensors="pt")["input_ids"]
output = model.generate(
    input_ids,
    max_new_tokens=arguments.max_new_tokens,
    return_dict_in_generate=True,
    output_history=True,
    **options,
)
tokens = tokenizer.batch_decode(output.sequences[0][:, None])
show_denoising(output.history, tokens)
print(f"{int(output.denoise_forwards[0])} denoise forwards for {len(tokens) - input_ids.shape[1]} tokens")
if arguments.output:
    path = plot_denoising(output.history, arguments.output, tokens, color_by=arguments.color_by)
    print("picture:", path)
