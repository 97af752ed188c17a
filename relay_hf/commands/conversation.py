"""The conversation of `relay-hf chat`."""

import sys
from typing import Any

from transformers import TextDiffusionStreamer, TextStreamer

from ..modeling import RelayCache


class Conversation:
    """Turns of a chat; what both turns begin with is computed once.

    Args:
        model, tokenizer: results of `load_for_decoding`.
        options: keyword arguments of `generate`.
        system: the message that begins it.
    """

    def __init__(self, model: Any, tokenizer: Any, options: dict[str, Any], system: str | None = None) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.beginning: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.clear()

    def clear(self) -> None:
        """Forgets all turns."""
        self.messages = list(self.beginning)
        self.cache = RelayCache(config=self.model.config.text_config)

    def reply(self, text: str) -> None:
        """Prints a reply while it is written. An interrupted turn leaves no trace in the chat."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        # Drafts are overwritten by escape sequences, which only a terminal understands.
        kind = TextDiffusionStreamer if sys.stdout.isatty() else TextStreamer
        streamer = kind(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            output = self.model.generate(
                **prompt, **self.options, cache=self.cache, streamer=streamer, return_dict_in_generate=True
            )
        except KeyboardInterrupt:
            streamer.end()
            return
        written = output.sequences[0, prompt["input_ids"].shape[1] :]
        reply = self.tokenizer.decode(written, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": reply}]
