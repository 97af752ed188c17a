"""Pushes a relay model and a LoRA adapter of it, and pulls both with `AutoModel`.

python examples/push_and_pull.py                      # tiny random ones, to a stand-in for the Hub on this machine
python examples/push_and_pull.py --owner YOUR_NAME    # the same to the Hub, as two private repositories: log in first

A model of yours needs one line of this, `push(folder, "you/name")`, or the command `relay-hf push FOLDER you/name`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--owner", help="your name on the Hub, or an organization of yours")
arguments = parser.parse_args()

scratch = tempfile.TemporaryDirectory()
hub = None
if arguments.owner is None:
    # The one of the tests. Set before anything of Hugging Face is imported, which reads this once.
    server = Path(__file__).parents[1] / "tests" / "hub" / "hub_server.py"
    hub = subprocess.Popen([sys.executable, server], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    os.environ |= {"HF_ENDPOINT": hub.stdout.readline().strip(), "HF_TOKEN": "hf_of_me", "HF_HOME": scratch.name}
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
owner = arguments.owner or "me"

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModel, AutoTokenizer  # noqa: E402

from relay_hf import PushError, RelayForMaskedDiffusion, push  # noqa: E402
from relay_hf.testing import byte_tokenizer, tiny_model  # noqa: E402


def written(model: torch.nn.Module) -> list[int]:
    return model.generate(input_ids=torch.arange(40, 50)[None], max_new_tokens=16)[0].tolist()


try:
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer, relay_init="ones")
    whole, adapter = f"{owner}/tiny-relay", f"{owner}/tiny-relay-lora"
    commit = push(model, whole, tokenizer=tokenizer, private=True)
    print("pushed", commit.commit_url)

    # An adapter is trained on what is on the Hub, so that its repository can name it.
    base = RelayForMaskedDiffusion.from_pretrained(whole)
    lora = get_peft_model(base, LoraConfig(target_modules="all-linear", modules_to_save=["relay"])).eval()
    torch.nn.init.normal_(lora.get_base_model().model.layers[0].self_attn.q_proj.lora_B.default.weight)
    print("pushed", push(lora, adapter, tokenizer=tokenizer, private=True).commit_url)

    for name, here in ((whole, model), (adapter, lora)):
        there = AutoModel.from_pretrained(name)
        print(name, "->", type(there).__name__, "| writes the same:", written(there) == written(here))
        assert AutoTokenizer.from_pretrained(name).mask_token_id == there.config.mask_token_id

    try:
        push(model, whole, token="hf_of_somebody_else")
    except PushError as error:
        print("refused:", error)
finally:
    if hub is not None:
        hub.stdin.close()
        hub.wait()
    scratch.cleanup()
