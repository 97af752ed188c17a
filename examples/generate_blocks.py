"""Block diffusion with a relay: what `generate` returns, and drafts on the screen.

python examples/generate_blocks.py                      # a tiny random model: fast, and nonsense
python examples/generate_blocks.py --model PATH_OR_ID   # yours, with its tokenizer
"""

import argparse

import torch
from transformers import AutoModel, AutoTokenizer, Qwen2Config, TextDiffusionStreamer

from relay_hf import RelayConfig, RelayForMaskedDiffusion

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="checkpoint to load")
parser.add_argument("--prompt", default="Why is the sky blue?")
parser.add_argument("--max-new-tokens", type=int, default=48)
arguments = parser.parse_args()

if arguments.model:
    model, tokenizer = AutoModel.from_pretrained(arguments.model), AutoTokenizer.from_pretrained(arguments.model)
    input_ids = tokenizer(arguments.prompt, return_tensors="pt")["input_ids"]
    streamer = TextDiffusionStreamer(tokenizer)
else:
    torch.manual_seed(0)
    backbone = Qwen2Config(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=256,
    )  # fmt: skip
    model = RelayForMaskedDiffusion(RelayConfig.fast_dllm_v2(backbone, mask_token_id=257))
    input_ids = torch.tensor([list(arguments.prompt.encode())])
    streamer = None

output = model.generate(
    input_ids,
    max_new_tokens=arguments.max_new_tokens,
    unmasking_threshold=0.85,
    streamer=streamer,
    return_dict_in_generate=True,
)
print("new tokens:", output.sequences[0, input_ids.shape[1] :].tolist())
for kind in ("denoise", "commit", "prefill"):
    print(f"{kind} forwards:", int(output[f"{kind}_forwards"][0]))
print(f"tokens per forward: {float(output.tokens_per_forward[0]):.2f}")
