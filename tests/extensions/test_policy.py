"""An unmasking policy of another package is one file: it decodes, trains, is saved and loaded, and describes itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from relay_hf import RelayConfig, RelayForMaskedDiffusion, register_policy
from relay_hf.cli import main
from relay_hf.modeling import Bounds, UnmaskingPolicy, make_policy
from relay_hf.modeling.unmasking_relay import POLICIES
from relay_hf.testing import byte_tokenizer
from relay_hf.trainers import RelayTrainerConfig

from ..conftest import MASK, text_config
from ..modeling.decoding import decode_alone
from ..trainers.conftest import build_model, build_trainer
from .policy import LeadingRun

OPTIONS = {"unmasking_policy": "leading_run", "unmasking_threshold": 0.2}


def test_policy_reveals_what_it_says() -> None:
    measure, masked = torch.tensor([[0.9, 0.1, 0.8, 0.4, 0.9]]), torch.tensor([[True, False, True, True, True]])
    assert make_policy("leading_run", 0.5)(measure, masked).tolist() == [[True, False, True, False, False]]
    assert make_policy("leading_run", 0.9)(measure.flip(1), masked).tolist() == [[True, False, False, False, False]]


@pytest.mark.parametrize("block_size", [8, None], ids=["blocks", "canvas"])
def test_policy_decodes(make_model: Callable[..., RelayForMaskedDiffusion], block_size: int | None) -> None:
    model, prompt = make_model(block_size=block_size, open_channel=True), torch.arange(1, 10)
    output = model.generate(
        prompt[None], **OPTIONS, max_new_tokens=15, eos_token_id=None, return_dict_in_generate=True, output_history=True
    )
    revealed_at = output.history.revealed_at[0]
    assert (revealed_at.diff() >= 0).all(), "from left to right"
    assert 2 < len(revealed_at.unique()) < 15
    if block_size is not None:
        expected = decode_alone(model, prompt, 15, policy="leading_run", threshold=0.2).tokens
        assert output.sequences[0, 9:].tolist() == expected


def test_policy_outside_its_bounds_raises(make_model: Callable[..., RelayForMaskedDiffusion]) -> None:
    with pytest.raises(ValueError, match=r"`unmasking_threshold=0.95` is not in \[0.1, 0.9\], as `leading_run` needs"):
        make_model().generate(torch.arange(1, 4)[None], unmasking_policy="leading_run", unmasking_threshold=0.95)


def test_policy_is_saved_and_loaded(make_model: Callable[..., RelayForMaskedDiffusion], tmp_path: Path) -> None:
    model, prompt = make_model(), torch.arange(1, 10)[None]
    model.generation_config.update(**OPTIONS)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.unmasking_policy == "leading_run"
    assert torch.equal(loaded.generate(prompt, max_new_tokens=8), model.generate(prompt, max_new_tokens=8))


def test_policy_that_was_not_registered_raises(
    make_model: Callable[..., RelayForMaskedDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(POLICIES, "leading_run")
    message = r"'leading_run'` is unknown.*first import the module that registers it with `relay_hf.register_policy`"
    with pytest.raises(ValueError, match=message):
        make_model().generate(torch.arange(1, 4)[None], **OPTIONS)


@pytest.mark.parametrize("block_size", [4, None], ids=["blocks", "canvas"])
def test_policy_trains_and_a_card_cites_it(tmp_path: Path, block_size: int | None) -> None:
    trainer = build_trainer(tmp_path, build_model(block_size=block_size), **OPTIONS, threshold_jitter=2.0)
    trainer.train()
    trainer.create_model_card("of training")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| `unmasking_policy` | `leading_run` |" in card
    assert "@misc{somebody2026leading," in card
    reveals = trainer.recipe.advances(trainer.args, trainer.relay_config, is_random=True)
    assert all(0.1 <= reveal.policy.threshold <= 0.9 for reveal in reveals)


def test_command_line_of_a_program_that_imports_the_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer()
    config = RelayConfig(text_config=text_config(vocab_size=len(tokenizer)), mask_token_id=tokenizer.mask_token_id)
    RelayForMaskedDiffusion(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = ["generate", str(tmp_path), "a", "--max_new_tokens", "4", "--unmasking_policy", "leading_run"]
    assert main([*command, "--unmasking_threshold", "0.5"]) == 0
    assert main([*command, "--unmasking_threshold", "0.95"]) != 0
    assert "is not in [0.1, 0.9], as `leading_run` needs" in capsys.readouterr().err


# -- what a policy says of itself --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restless(UnmaskingPolicy):
    """Reveals all that is masked,
    at once.

    No threshold.
    """

    @property
    def reads(self) -> str:
        return "margin"

    def __call__(self, measure: torch.Tensor, masked: torch.Tensor, progress: Any = None) -> torch.Tensor:
        return masked


class Undecorated(UnmaskingPolicy):
    bounds: ClassVar[Bounds] = Bounds()


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "restless", Restless)


def test_sentence_is_what_the_docstring_begins_with() -> None:
    assert Restless.sentence() == "Reveals all that is masked, at once."
    assert LeadingRun.sentence().endswith("and the leftmost one in any case.")


@pytest.mark.usefixtures("restless")
def test_policy_without_threshold_decodes_and_reads_margins(
    make_model: Callable[..., RelayForMaskedDiffusion],
) -> None:
    output = make_model().generate(
        torch.arange(1, 9)[None], unmasking_policy="restless", max_new_tokens=8, return_dict_in_generate=True
    )
    assert output.denoise_forwards.tolist() == [1]
    assert MASK not in output.sequences


@pytest.mark.usefixtures("restless")
def test_training_refuses_what_it_does_not_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'restless'` reads the margin of distributions, which training does not"):
        RelayTrainerConfig(str(tmp_path), use_cpu=True, unmasking_policy="restless")
    monkeypatch.setattr(Restless, "reads", "confidence")
    RelayTrainerConfig(str(tmp_path), use_cpu=True, unmasking_policy="restless")
    with pytest.raises(ValueError, match=r"`threshold_jitter=0.1` would make a fraction of the threshold.*or none"):
        RelayTrainerConfig(str(tmp_path), use_cpu=True, unmasking_policy="restless", threshold_jitter=0.1)


@pytest.mark.parametrize(
    ("name", "cls", "message"),
    [
        ("fixed_count", LeadingRun, r"`unmasking_policy='fixed_count'` is taken by `.*\.FixedCount`"),
        ("mine", dict, "was given <class 'dict'>: give a subclass of `UnmaskingPolicy`"),
        (
            "mine",
            Undecorated,
            r"has bounds but no field `threshold`: add one, and decorate .* `@dataclass\(frozen=True\)`",
        ),
    ],
)
def test_register_policy_what_cannot_be_raises(name: str, cls: Any, message: str) -> None:
    before = dict(POLICIES)
    with pytest.raises(ValueError, match=message):
        register_policy(name, cls)
    assert before == POLICIES
