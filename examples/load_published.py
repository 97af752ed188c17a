"""Loads a checkpoint in the layout of the research fork, and saves it in ours.

python examples/load_published.py                     # writes a tiny one in that layout first
python examples/load_published.py --model PATH_OR_ID  # `model_type: Fast_dLLM_Qwen`, with or without a relay
"""

import argparse
import json
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoModel

from relay_hf import RelayForMaskedDiffusion
from relay_hf.testing import tiny_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="checkpoint to load")
arguments = parser.parse_args()


def write_in_published_layout(folder: Path) -> str:
    """A tiny random checkpoint with the names of the research fork."""
    ours = tiny_model()
    ours.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("relay.norm.", "model.relay_layer_norm."): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    published = {"model_type": "Fast_dLLM_Qwen", "use_relay": True, "bd_size": 8, "mask_token_id": 63}
    (folder / "config.json").write_text(json.dumps({**ours.config.text_config.to_dict(), **published}))
    return str(folder)


with tempfile.TemporaryDirectory() as scratch:
    source = arguments.model or write_in_published_layout(Path(scratch) / "published")
    model = RelayForMaskedDiffusion.from_pretrained(source)
    print("channel:", model.config.relay_channel, "| first state:", model.config.relay_initial_state)
    model.save_pretrained(Path(scratch) / "ours")
    again = AutoModel.from_pretrained(Path(scratch) / "ours")
    print("saved again as", again.config.model_type, "with", [n for n, _ in again.named_parameters() if "relay" in n])
