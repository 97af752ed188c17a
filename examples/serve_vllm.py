"""vLLM decodes a relay model, several prompts at once, and writes what `generate` writes.

    pip install 'relay-hf[vllm]'
    python examples/serve_vllm.py                      # a tiny random model, on a GPU
    python examples/serve_vllm.py --model PATH_OR_REPO

vLLM finds the plug-in of relay_hf by itself. Without vLLM the script says so and ends. docs/vllm.md has the rest: the
server for OpenAI clients, options of a request, several GPUs.
"""

import argparse
import importlib.util
import tempfile

import torch

from relay_hf import RelayForMaskedDiffusion
from relay_hf.testing import tiny_model

PROMPTS = [[5, 6, 7], list(range(8, 20)), [40, 30, 20, 10] * 5]
OPTIONS = {"unmasking_policy": "confidence_threshold", "unmasking_threshold": 0.3}


def make_model(folder: str) -> str:
    """A tiny model with a random channel; heads of 64 are what every kernel of vLLM takes."""
    text = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    tiny_model(open_channel=True, text=text, token_shift=True).save_pretrained(folder)
    return folder


def serve(source: str, new_tokens: int) -> list[list[int]]:
    """The new tokens that vLLM writes to the prompts."""
    from vllm import LLM, SamplingParams

    llm = LLM(source, dtype="float32", skip_tokenizer_init=True, max_model_len=256)
    params = SamplingParams(max_tokens=new_tokens, detokenize=False, ignore_eos=True, extra_args=OPTIONS)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; by default a tiny random model")
    parser.add_argument("--new_tokens", type=int, default=32)
    arguments = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed: `pip install 'relay-hf[vllm]'` on a machine with a GPU, then run this again.")
        return
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.model or make_model(folder)
        served = serve(source, arguments.new_tokens)
        model = RelayForMaskedDiffusion.from_pretrained(source, dtype="float32").eval()
        for prompt, tokens in zip(PROMPTS, served, strict=True):
            known = {"max_new_tokens": arguments.new_tokens, "eos_token_id": None, "pad_token_id": 0}
            expected = model.generate(torch.tensor([prompt]), **known, **OPTIONS)[0, len(prompt) :].tolist()
            print("the same" if tokens == expected else "another text", tokens)


if __name__ == "__main__":
    main()
