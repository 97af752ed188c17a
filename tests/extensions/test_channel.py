"""A channel of another package is one file: it trains, decodes, is saved and loaded, and a card describes it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from relay_hf import RelayConfig, RelayForMaskedDiffusion, register_channel
from relay_hf.cli import main
from relay_hf.hub_cards import plain_card, render_card
from relay_hf.modeling import Channel, DistributionChannel, make_policy
from relay_hf.modeling.channel_relay import CHANNELS, LayerNormChannel

from ..conftest import MASK, text_config
from ..modeling.decoding import decode_alone
from ..trainers.conftest import build_model, build_trainer
from .channel import BoundedChannel

ROOT = Path(__file__).parents[2]
OPEN = {"relay_channel": "bounded", "relay_options": {"softness": 0.5}, "token_shift": True}


@pytest.fixture
def model(make_model: Callable[..., RelayForMaskedDiffusion]) -> RelayForMaskedDiffusion:
    """With the channel open, so that its state matters."""
    model = make_model(**OPEN)
    torch.nn.init.normal_(model.relay.weight, std=2.0)
    return model


def test_config_asks_the_channel(tmp_path: Path) -> None:
    config = RelayConfig(text_config=text_config(), mask_token_id=MASK, **OPEN)
    assert (config.channel_class, config.relay_state_width) == (BoundedChannel, 8)
    config.save_pretrained(tmp_path)
    assert RelayConfig.from_pretrained(tmp_path).relay_options == {"softness": 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softness": 0.0}, r"`relay_options=\{'softness': 0.0\}` must be above 0"),
        ({"hardness": 1.0}, r"`relay_options` names \['hardness'\].*'bounded'` has the options \['softness'\]"),
    ],
)
def test_config_that_the_channel_refuses_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelayConfig(text_config=text_config(), relay_channel="bounded", relay_options=options)


def test_options_of_a_channel_without_any_raise() -> None:
    with pytest.raises(ValueError, match=r"'layer_norm'` has the options \[\]: leave out"):
        RelayConfig(text_config=text_config(), relay_options={"softness": 0.5})


def test_fresh_channel_writes_its_initial_values(make_model: Callable[..., RelayForMaskedDiffusion]) -> None:
    assert make_model(**OPEN).relay.weight.tolist() == [0.0] * 8


@pytest.mark.parametrize("objective", ["relay", "relay_sg"])
@pytest.mark.parametrize("block_size", [4, None], ids=["blocks", "canvas"])
def test_channel_is_trained(tmp_path: Path, objective: str, block_size: int | None) -> None:
    trainer = build_trainer(tmp_path, build_model(block_size=block_size, **OPEN), objective=objective)
    trainer.train()
    assert trainer.model.relay.weight.abs().min() > 0
    assert trainer.model.relay.weight.dtype == torch.float32


def plain_canvas(model: RelayForMaskedDiffusion, prompt: Tensor, count: int, threshold: float) -> list[int]:
    """Whole forwards, one after the other, of a prompt and `count` masks."""
    tokens = torch.cat([prompt, prompt.new_full((count,), MASK)])[None]
    state, policy = model.initial_relay_state(*tokens.shape), make_policy("confidence_threshold", threshold)
    while (masked := tokens == MASK).any():
        output = model(tokens, relay_state=state)
        state, probabilities = output.relay_state, output.logits.softmax(-1)
        confidence, best = probabilities.index_fill(-1, torch.tensor(MASK), -1.0).max(-1)
        tokens = best.where(policy(confidence, masked), tokens)
    return tokens[0, len(prompt) :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("block_size", [8, None], ids=["blocks", "canvas"])
def test_decoding_equals_the_plain_loop(
    make_model: Callable[..., RelayForMaskedDiffusion], block_size: int | None
) -> None:
    model, prompt = make_model(block_size=block_size, **OPEN), torch.arange(1, 10)
    torch.nn.init.normal_(model.relay.weight, std=2.0)
    options = {"unmasking_policy": "confidence_threshold", "unmasking_threshold": 0.3, "max_new_tokens": 15}
    tokens, without = (
        model.generate(prompt[None], **options, eos_token_id=None, use_relay=use_relay)[0, 9:].tolist()
        for use_relay in (True, False)
    )
    expected = plain_canvas(model, prompt, 15, 0.3)
    if block_size is not None:
        expected = decode_alone(model, prompt, 15, threshold=0.3).tokens
    assert tokens == expected
    assert tokens != without


LOAD = """
import sys, torch, relay_hf
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
import tests.extensions.channel
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.arange(8)[None]).relay_state, sys.argv[1] + "/state.pt")
"""


def test_another_process_loads_the_checkpoint_as_soon_as_it_imports_the_channel(
    model: RelayForMaskedDiffusion, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).relay.weight, model.relay.weight)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == (
        "`relay_channel='bounded'` is unknown: choose one of ['layer_norm', 'none', 'residual_context', 'soft_mask'], "
        "or first import the module that registers it with `relay_hf.register_channel`."
    )
    torch.testing.assert_close(torch.load(tmp_path / "state.pt"), model(torch.arange(8)[None]).relay_state.detach())


def test_command_without_the_channel_says_what_to_import(
    model: RelayForMaskedDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path)
    monkeypatch.delitem(CHANNELS, "bounded")
    assert main(["generate", str(tmp_path), "a"]) == 2
    assert "first import the module that registers it with `relay_hf.register_channel`" in capsys.readouterr().err


def test_cards_describe_and_cite_the_channel(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path / "run", build_model(**OPEN))
    trainer.create_model_card("of training")
    card = (tmp_path / "run/README.md").read_text(encoding="utf-8")
    for text in (card, render_card(plain_card("plain", trainer.model.config))):
        assert "half of a hidden state, bounded by a tanh of softness 0.5, added at its own place." in text
        assert "@misc{somebody2026bounded," in text
        assert "- Channel: `bounded`, which is registered by `import tests.extensions.channel`: import it" in text


# -- a channel that reads distributions --------------------------------------------------------------------------------


class BestToken(DistributionChannel):
    """The embedding of the best token, by how probable it is."""

    def summarise(self, logits: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        probability, token = logits.softmax(-1).max(-1)
        return embeddings[token], probability


@pytest.mark.parametrize(
    ("objective", "is_given"), [("residual_context", False), ("residual_context", True), ("relay_sg", False)]
)
def test_distribution_channel_is_trained_by_its_objectives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, objective: str, is_given: bool
) -> None:
    monkeypatch.setitem(CHANNELS, "best_token", BestToken)
    model = build_model(relay_channel="best_token")
    reference = {"reference_model": build_model(seed=1, relay_channel="none")} if is_given else {}
    trainer = build_trainer(tmp_path, model, trainer_options=reference, objective=objective)
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.lm_head.weight, before)
    with pytest.raises(ValueError, match="'relay'"):
        build_trainer(tmp_path, model, objective="relay")


# -- registration ------------------------------------------------------------------------------------------------------


class Other(Channel):
    pass


class Reading(Channel):
    reads_distribution = True


@pytest.mark.parametrize(
    ("name", "cls", "message"),
    [
        ("layer_norm", Other, r"`relay_channel='layer_norm'` is taken by `.*\.LayerNormChannel`: choose another name"),
        ("mine", torch.nn.Linear, r"`relay_hf.register_channel\('mine', ...\)` was given .*: give a subclass of `Chan"),
        ("mine", "Other", r"was given 'Other': give a subclass of `Channel`"),
        ("mine", Reading, "reads distributions, but has no `state_of`.*: inherit from `DistributionChannel`"),
        ("", Other, "was given the name '': give a text, the `relay_channel` to be"),
        (None, Other, "was given the name None"),
    ],
)
def test_register_channel_what_cannot_be_raises(name: Any, cls: Any, message: str) -> None:
    before = dict(CHANNELS)
    with pytest.raises(ValueError, match=message):
        register_channel(name, cls)
    assert before == CHANNELS


def test_register_channel_defined_again_replaces_the_former(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's cell that runs twice."""
    monkeypatch.setitem(CHANNELS, "bounded", BoundedChannel)
    again = type("BoundedChannel", (Channel,), {"__module__": BoundedChannel.__module__})
    register_channel("bounded", again)
    assert CHANNELS["bounded"] is again


# -- next_state is asked wherever a state is made ----------------------------------------------------------------------


class Doubling(LayerNormChannel):
    """Leaves twice the state that it reads."""

    def next_state(self, readings: Any) -> Tensor:
        return 2 * readings.read_out


@pytest.mark.parametrize("block_size", [4, None], ids=["blocks", "canvas"])
def test_state_of_training_is_what_the_channel_leaves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, block_size: int | None
) -> None:
    states = []
    for channel in (LayerNormChannel, Doubling):
        monkeypatch.setitem(CHANNELS, "layer_norm", channel)
        trainer = build_trainer(tmp_path, build_model(block_size=block_size), rollout_steps=1, max_steps=1)
        trainer.train()
        states.append(trainer.buffer.rows.relay_state)
    assert states[0].any()
    torch.testing.assert_close(states[1], 2 * states[0])
