"""Block diffusion with a relay: what `generate` returns, and drafts on the screen.

python examples/generate_blocks.py                      # a tiny random model: fast, and nonsense
python examples/generate_blocks.py --model PATH_OR_ID   # yours, with its tokenizer
"""

import argparse

from transformers import AutoModel, AutoTokenizer, TextDiffusionStreamer

from relay_hf.testing import byte_tokenizer, tiny_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="checkpoint to load")
parser.add_argument("--prompt", default="Why is the sky blue?")
parser.add_argument("--max-new-tokens", type=int, default=48)
arguments = parser.parse_args()

if arguments.model:
    model, tokenizer = AutoModel.from_pretrained(arguments.model), AutoTokenizer.from_pretrained(arguments.model)
else:
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer, block_size=32, token_shift=True)

input_ids = tokenizer(arguments.prompt, return_tensors="pt")["input_ids"]
output = model.generate(
    input_ids,
    max_new_tokens=arguments.max_new_tokens,
    unmasking_threshold=0.85,
    streamer=TextDiffusionStreamer(tokenizer),
    return_dict_in_generate=True,
)
print("new tokens:", output.sequences[0, input_ids.shape[1] :].tolist())
for kind in ("denoise", "commit", "prefill"):
    print(f"{kind} forwards:", int(output[f"{kind}_forwards"][0]))
print(f"tokens per forward: {float(output.tokens_per_forward[0]):.2f}")
