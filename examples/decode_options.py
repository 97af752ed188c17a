"""Ways to decode: policies, shortcuts, seeded drawing, and the turns of a chat on one cache.

python examples/decode_options.py                      # a tiny random model: fast, and nonsense
python examples/decode_options.py --model PATH_OR_ID   # yours, with its tokenizer
"""

import argparse

import torch
from transformers import AutoModel, AutoTokenizer

from relay_hf import RelayCache
from relay_hf.testing import byte_tokenizer, tiny_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="checkpoint to load")
parser.add_argument("--max-new-tokens", type=int, default=48)
arguments = parser.parse_args()

questions = ["Why is the sky blue?", "And at night?", "Then what are stars?"]
if arguments.model:
    model, tokenizer = AutoModel.from_pretrained(arguments.model), AutoTokenizer.from_pretrained(arguments.model)
else:
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer, block_size=32, token_shift=True)
prompts = [tokenizer(question, return_tensors="pt")["input_ids"] for question in questions]

WAYS = {
    "sure above 0.85, or the best": {},
    "best 4 per step": {"unmasking_policy": "fixed_count", "unmasking_threshold": 4},
    "uncertainty up to 0.5 per step": {"unmasking_policy": "confidence_budget", "unmasking_threshold": 0.5},
    "entropy up to 0.5 nats per step": {"unmasking_policy": "entropy_bound", "unmasking_threshold": 0.5},
    "sub-block cache": {"use_sub_block_cache": True},
    "fused commits": {"fuse_commits": True},
    "each block started by a pass of its own": {"relay_start": "self"},
    "drawn, cooling down": {"do_sample": True, "t_max": 1.0, "t_min": 0.3, "top_p": 0.95, "sampling_seeds": [7]},
}
for way, options in WAYS.items():
    output = model.generate(
        prompts[0], max_new_tokens=arguments.max_new_tokens, return_dict_in_generate=True, **options
    )
    counts = [int(output[f"{kind}_forwards"][0]) for kind in ("denoise", "commit", "prefill")]
    print(f"{way}: denoise, commit, prefill = {counts}")

# Residual context diffusion may start a block from the predictions of another model.
if not arguments.model:
    residual = tiny_model(tokenizer, block_size=32, token_shift=True, relay_channel="residual_context")
    output = residual.generate(
        prompts[0], max_new_tokens=arguments.max_new_tokens, return_dict_in_generate=True, relay_start="reference",
        reference_model=model,
    )  # fmt: skip
    counts = [int(output.denoise_forwards), int(output.reference_forwards)]
    print(f"each block started by another model: denoise, reference = {counts}")

# Each turn computes only what the turns before did not.
cache, text = RelayCache(config=model.config.text_config), torch.empty(1, 0, dtype=torch.long)
for prompt in prompts:
    text = torch.cat([text, prompt], dim=1)
    known = cache.get_seq_length()
    text = model.generate(text, max_new_tokens=arguments.max_new_tokens, cache=cache)
    print(f"turn: {known} tokens known from before, {cache.get_seq_length()} now, {text.shape[1]} in all")
