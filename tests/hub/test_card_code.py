"""The code of published cards runs as it stands, in processes that know nothing but the Hub."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

from relay_hf import RelayForMaskedDiffusion, push
from relay_hf.testing import CHAT_TEMPLATE

from ..trainers.conftest import build_trainer
from .conftest import MASK
from .hub_server import HubServer

RUN = """
import re, sys
from huggingface_hub import ModelCard
for repository in sys.argv[1:]:
    code = re.search(r"```python\\n(.*?)```", ModelCard.load(repository).text, re.S)[1]
    if "without package" in sys.argv[0]:
        code = code.split("\\n", 1)[1].replace('")\\n', '", trust_remote_code=True)\\n', 2)
    exec(code, {})
assert ("relay_hf" in sys.modules) == ("without package" not in sys.argv[0])
"""


@pytest.mark.parametrize("start", ["", "sys.argv[0] = 'without package'"])
def test_code_of_published_cards_runs(
    start: str,
    hub: HubServer,
    model: RelayForMaskedDiffusion,
    make_adapter: Callable[..., object],
    tokenizer: PreTrainedTokenizerFast,
    hub_environment: Callable[[HubServer], dict[str, str]],
    tmp_path: Path,
) -> None:
    chat_tokenizer = copy.deepcopy(tokenizer)
    chat_tokenizer.chat_template = CHAT_TEMPLATE

    make_adapter()
    base = RelayForMaskedDiffusion.from_pretrained("me/base", block_size=8, mask_token_id=MASK)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    for name, trained, words, adapters in (("whole", model, chat_tokenizer, None), ("lora", base, tokenizer, lora)):
        others = {"processing_class": words, "peft_config": adapters}
        trainer = build_trainer(tmp_path / name, trained, trainer_options=others, max_steps=1)
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()  # whose code loads the folder
        moved = (tmp_path / name).rename(tmp_path / f"moved-{name}")
        push(moved, f"me/{name}")
    push(model, "me/plain", tokenizer=tokenizer)  # without a card of its own

    cards = [hub.repositories[name].files["README.md"].decode() for name in ("me/whole", "me/lora", "me/plain")]
    assert all(str(tmp_path) not in card for card in cards)
    assert all("the code is in the repository" in card for card in cards)
    command = [sys.executable, "-c", f"import sys; {start}\n{RUN}", "me/whole", "me/lora", "me/plain"]
    done = subprocess.run(command, cwd=tmp_path, env=hub_environment(hub), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^denoise forwards: [1-9]\d*$", done.stdout, re.M)) == 3
    assert done.stdout.count("The capital of France is") == 2
    assert [bool(ModelCard(card).data.base_model) for card in cards] == [False, True, False]
