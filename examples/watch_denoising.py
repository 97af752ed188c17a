"""Watches a text being written, step by step: in the terminal, and as a picture.

python examples/watch_denoising.py                             # a tiny random model: fast, and nonsense
python examples/watch_denoising.py --output denoising.png      # with the picture
python examples/watch_denoising.py --model PATH_OR_ID          # yours, with its tokenizer
"""

import argparse

import torch
from transformers import AutoModel, AutoTokenizer, Qwen2Config

from relay_hf import RelayConfig, RelayForMaskedDiffusion, plot_denoising, show_denoising

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
    input_ids = tokenizer(arguments.prompt, return_tensors="pt")["input_ids"]
else:
    # One token a byte. A random model is never sure, so the threshold is low and letters are all it may say.
    torch.manual_seed(0)
    backbone = Qwen2Config(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=256, initializer_range=0.2,
    )  # fmt: skip
    model = RelayForMaskedDiffusion(
        RelayConfig(text_config=backbone, block_size=16, mask_token_id=257, token_shift=True)
    )
    input_ids = torch.tensor([list(arguments.prompt.encode())])
    letters = set(b"abcdefghijklmnopqrstuvwxyz ")
    suppressed = [token for token in range(258) if token not in letters]
    options = {"unmasking_threshold": 0.25, "sub_block_size": 8, "suppress_tokens": suppressed} | options

output = model.generate(
    input_ids,
    max_new_tokens=arguments.max_new_tokens,
    return_dict_in_generate=True,
    output_history=True,
    **options,
)
ids = output.sequences[0].tolist()
tokens = [tokenizer.decode([token]) for token in ids] if arguments.model else [chr(token) for token in ids]
show_denoising(output.history, tokens)
print(f"{int(output.denoise_forwards[0])} denoise forwards for {len(ids) - input_ids.shape[1]} tokens")
if arguments.output:
    path = plot_denoising(output.history, arguments.output, tokens, color_by=arguments.color_by)
    print("picture:", path)
