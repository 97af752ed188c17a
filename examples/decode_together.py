"""Decode the rows of several calls together, as they come: they join at block borders and leave when they are done.

    python examples/decode_together.py

Three calls come one block apart. Each gets the text and the forwards that it has alone, and together they take fewer
than the sum. This is what `relay-hf serve` does with its requests.
"""

import torch

from relay_hf.testing import byte_tokenizer, tiny_model

tokenizer = byte_tokenizer()
model = tiny_model(tokenizer, open_channel=True, token_shift=True).double()
prompts = ["Once upon a time", "And now for", "The quick brown fox jumps over"]
options = {"unmasking_threshold": 0.3, "eos_token_id": None, "return_dict_in_generate": True}
forwards = 0


def count(*_: object) -> None:
    global forwards
    forwards += 1


model.register_forward_pre_hook(count)
waiting = [
    model.block_decoder(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=24 + 8 * n, **options)
    for n, prompt in enumerate(prompts)
]
names = {decoder.grid.batches[0]: n for n, decoder in enumerate(waiting)}
outputs = {}
with torch.no_grad():
    running = waiting.pop(0)
    running.prefill()
    while running.grid.ends or waiting:
        if waiting:
            new = waiting.pop(0)
            new.prefill()
            running.join(new)
        for batch in running.step_block():
            outputs[names[batch]] = running.output(batch)
            print(f"call {names[batch]} is done after {forwards} forwards of the model")

together, forwards = forwards, 0
for n, prompt in enumerate(prompts):
    alone = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=24 + 8 * n, **options)
    assert alone.sequences.equal(outputs[n].sequences)
    assert alone.denoise_forwards.equal(outputs[n].denoise_forwards)
print(f"together: {together} forwards, one after the other: {forwards}")
