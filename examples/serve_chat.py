"""Serves a relay model to OpenAI clients, chats with it in two turns and stops the server.

python examples/serve_chat.py                       # a tiny random model: fast, and nonsense
python examples/serve_chat.py --model PATH_OR_ID    # yours, with its tokenizer and chat template

Needs `pip install 'relay-hf[serve]'`. In earnest the server is one command, `relay-hf serve PATH_OR_ID`, and clients
are other programs; see docs/serving.md.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from openai import OpenAI

from relay_hf.testing import CHAT_TEMPLATE, all_tokens_but, byte_tokenizer, tiny_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="folder or Hub id of a relay model with a chat template")
parser.add_argument("--max-tokens", type=int, default=40)
arguments = parser.parse_args()


def save_tiny_model(folder: Path) -> None:
    """A random model that says letters and spaces, and its tokenizer."""
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    model = tiny_model(tokenizer, token_shift=True)
    model.generation_config.suppress_tokens = all_tokens_but(tokenizer, "abcdefghijklmnopqrstuvwxyz ")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


with tempfile.TemporaryDirectory() as scratch:
    name = arguments.model or str(Path(scratch) / "model")
    if not arguments.model:
        save_tiny_model(Path(name))

    # Port 0: any free one, which the server prints with its address.
    command = [Path(sys.executable).with_name("relay-hf"), "serve", name, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            address = next((match.group() for line in server.stdout if (match := re.search(r"http://\S+", line))), None)
            if address is None:
                raise SystemExit(f"The server did not start: run `relay-hf serve {name}` to see why.")
            # Retries cover the moment between the address and the first answer.
            client = OpenAI(base_url=address, api_key="none", max_retries=5)
            messages = []
            for question in ("Who are you?", "And what do you think about relays?"):
                messages.append({"role": "user", "content": question})
                stream = client.chat.completions.create(
                    model=name,
                    messages=messages,
                    max_tokens=arguments.max_tokens,
                    stream=True,
                    extra_body={"generation_config": {"unmasking_threshold": 0.3}},  # for this request only
                )
                print(f"user: {question}\nassistant: ", end="")
                reply = ""
                for chunk in stream:
                    text = chunk.choices[0].delta.content or ""
                    print(text, end="", flush=True)
                    reply += text
                print()
                messages.append({"role": "assistant", "content": reply})
        finally:
            server.terminate()
