"""Trains a relay model on conversations, learning only what the assistant says, and asks the saved model a question.

python examples/train_chat.py                               # a tiny random Qwen2 learns eight answers by heart
python examples/train_chat.py --lora                        # adapters on a random model learn little: to try it out
python examples/train_chat.py --base Qwen/Qwen2.5-0.5B-Instruct --mask-token-id 151665 --data chats.jsonl --steps 200
"""

import argparse
import tempfile
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from relay_hf import RelayForMaskedDiffusion
from relay_hf.testing import byte_tokenizer, tiny_decoder
from relay_hf.trainers import RelayTrainer, RelayTrainerConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", help="causal decoder to start from, with its tokenizer and chat template")
parser.add_argument("--mask-token-id", type=int, default=258)
parser.add_argument("--data", help="JSON lines with `messages`: a list of `role` and `content`")
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--lora", action="store_true", help="train adapters; the channel is trained in full either way")
parser.add_argument("--output", default=None, help="folder for the model")
arguments = parser.parse_args()

# The text between `generation` and `endgeneration` is learned: the words of the assistant, and the token that ends
# its turn. Templates of well-known models have these marks, or TRL knows a version that does.
CHAT_TEMPLATE = """
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- "A:" }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- "Q:" + message.content + " " }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "A:" }}{% endif %}"""
ANSWERS = {
    "the sun?": "hot", "the moon?": "cold", "grass?": "green", "the sea?": "blue", "snow?": "white", "coal?": "black",
    "one and one?": "two", "two and two?": "four",
}  # fmt: skip


def tiny_base(folder: Path) -> tuple[str, PreTrainedTokenizerBase]:
    """A random Qwen2 of two layers and a tokenizer with one token a byte."""
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    tiny_decoder(tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return str(folder), tokenizer


with tempfile.TemporaryDirectory() as scratch:
    if arguments.base:
        base, tokenizer = arguments.base, AutoTokenizer.from_pretrained(arguments.base)
    else:
        base, tokenizer = tiny_base(Path(scratch) / "base")
    model = RelayForMaskedDiffusion.from_pretrained(base, mask_token_id=arguments.mask_token_id, dtype="float32")
    if arguments.data:
        dataset = load_dataset("json", data_files=arguments.data, split="train")
    else:
        talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ANSWERS.items()]
        dataset = Dataset.from_list([{"messages": talk} for talk in talks])

    output = arguments.output or str(Path(scratch) / "run")
    trainer = RelayTrainer(
        model,
        RelayTrainerConfig(
            output,
            objective="relay",
            assistant_only_loss=True,
            max_steps=arguments.steps,
            learning_rate=1e-4 if arguments.base else 1e-2,
            relay_learning_rate=1e-3,
            per_device_train_batch_size=8,
            logging_steps=max(arguments.steps // 4, 1),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM") if arguments.lora else None,
    )
    row = trainer.train_dataset[0]
    print("learned of the first row:", repr(tokenizer.decode([label for label in row["labels"] if label != -100])))
    trainer.train()
    print("losses:", [round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry])

    # Merged adapters are a model like any other; an adapter folder alone names the decoder it started from, which has
    # neither blocks nor a channel.
    trained = trainer.model.merge_and_unload() if arguments.lora else trainer.model
    trained.save_pretrained(output)
    tokenizer.save_pretrained(output)

    model, tokenizer = AutoModel.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    question = dataset[0]["messages"][:1]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    reply = model.generate(**prompt, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
    print(question[0]["content"], "->", repr(tokenizer.decode(reply, skip_special_tokens=True)))
