"""RelayTrainer on text as users have it: what of it is learned, in which precision, and what is left on disk."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, TrainerCallback

from relay_hf import RelayForMaskedDiffusion
from relay_hf.trainers import RelayTrainer

from .test_relay_trainer import logged, weights
from .text import build_text_model, build_tokenizer


def said(*texts: str) -> list[dict[str, str]]:
    """A conversation in which user and assistant take turns."""
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


# Text of a row in turns, by what is done with it: seen, learned, seen, learned, ...
Turns = tuple[str, ...]

PAIRS = [("2 + 2 = ", "4."), ("one, two, ", "three"), ("a", "b c d e f")]
TALKS = [said("hi", "hello", "why?", "so"), said("sum", "four"), said("color", "blue", "or", "red")]
FORMATS: dict[str, tuple[list[dict[str, Any]], list[Turns], dict[str, Any]]] = {
    "prompt and completion": (
        [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS],
        [(prompt, f"{completion}¶") for prompt, completion in PAIRS],
        {},
    ),
    "prompt and completion, all learned": (
        [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS],
        [("", f"{prompt}{completion}¶") for prompt, completion in PAIRS],
        {"completion_only_loss": False},
    ),
    "empty completion": ([{"prompt": "Silence.", "completion": ""}], [("Silence.", "¶")], {}),
    "prompt and completion as messages": (
        [{"prompt": talk[:1], "completion": talk[1:2]} for talk in TALKS],
        [("U:hi;A:", "hello¶"), ("U:sum;A:", "four¶"), ("U:color;A:", "blue¶")],
        {},
    ),
    "messages, assistant only": (
        [{"messages": talk} for talk in TALKS],
        [
            ("U:hi;A:", "hello¶", "U:why?;A:", "so¶"),
            ("U:sum;A:", "four¶"),
            ("U:color;A:", "blue¶", "U:or;A:", "red¶"),
        ],
        {"assistant_only_loss": True},
    ),
    "messages": ([{"messages": talk} for talk in TALKS[1:2]], [("", "U:sum;A:four¶")], {}),
    "text": ([{"text": "some text"}, {"text": "more of it"}], [("", "some text¶"), ("", "more of it¶")], {}),
    "another text column": ([{"poem": "a rose"}], [("", "a rose¶")], {"dataset_text_field": "poem"}),
    "token ids": (
        [{"input_ids": [65, 66, 67], "labels": [-100, 66, 67]}, {"input_ids": [68, 69], "labels": [-100, 69]}],
        [("b", "cd"), ("e", "f")],
        {},
    ),
    "response longer than max_length": (
        [{"prompt": "12", "completion": "345678"}],
        [("12", "345")],
        {"max_length": 5},
    ),
}


def watch(trainer: RelayTrainer) -> list[list[str]]:
    """The rows of every pass of the network from now on: `_` is [MASK], `¶` the end of text; padding is left out."""
    # The collator pads with [PAD], the buffer with token 0, which is "!" and not used here.
    signs = ["", *(trainer.processing_class.decode([token]) for token in range(1, 256)), "¶", "", "_"]
    passes: list[list[str]] = []

    def note(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        passes.append(["".join(signs[token] for token in row) for row in arguments[0].tolist()])

    trainer.model.get_input_embeddings().register_forward_pre_hook(note)
    return passes


def hidden(turns: Turns) -> str:
    """A row with all it teaches masked."""
    return "".join("_" * len(text) if i % 2 else text for i, text in enumerate(turns))


def pattern(turns: Turns) -> str:
    """What a row may look like when some of what it teaches has been revealed."""
    kept = [[f"[_{sign}]" for sign in text] if i % 2 else [re.escape(text)] for i, text in enumerate(turns)]
    return "".join(part for text in kept for part in text)


@pytest.fixture
def text_trainer(make_trainer: Callable[..., RelayTrainer]) -> Callable[..., RelayTrainer]:
    """Makes a trainer for rows of text, by default prompts and completions."""

    def make(
        rows: Any = FORMATS["prompt and completion"][0], model: Any = None, options: dict | None = None, **changes: Any
    ) -> RelayTrainer:
        data = Dataset.from_list(rows) if isinstance(rows, list) else rows
        model = build_text_model() if model is None else model
        # Rows start with everything masked, so that the first pass shows all that is learned.
        changes = {"staggered_start": False, **changes}
        return make_trainer(model, data, {"processing_class": build_tokenizer(), **(options or {})}, **changes)

    return make


# -- what is learned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("name", FORMATS)
def test_training_masks_the_response_only(text_trainer: Callable[..., RelayTrainer], name: str, streamed: bool) -> None:
    rows, expected, changes = FORMATS[name]
    data = Dataset.from_list(rows * 4)
    data = data.to_iterable_dataset() if streamed else data
    # Every pass of a whole-sequence model shows whole rows.
    changes = {"per_device_train_batch_size": 4 * len(rows), **changes}  # places for all rows
    trainer = text_trainer(data, build_text_model(block_size=None), **changes)
    passes = watch(trainer)
    trainer.train()
    assert set(passes[0]) <= {hidden(turns) for turns in expected}
    assert {row for seen in passes for row in seen} >= {hidden(turns) for turns in expected}
    shapes = "|".join(pattern(turns) for turns in expected)
    assert [row for seen in passes for row in seen if not re.fullmatch(shapes, row)] == []


@pytest.mark.parametrize("objective", ["relay_sg", "rollout", "masked"])
def test_other_objectives_mask_the_response_only(text_trainer: Callable[..., RelayTrainer], objective: str) -> None:
    rows, expected, changes = FORMATS["messages, assistant only"]
    trainer = text_trainer(rows * 4, build_text_model(block_size=None), objective=objective, **changes)
    passes = watch(trainer)
    trainer.train()
    shapes = "|".join(pattern(turns) for turns in expected)
    assert [row for seen in passes for row in seen if not re.fullmatch(shapes, row)] == []
    assert any("_" in row for seen in passes for row in seen)


class Snapshots(TrainerCallback):
    """Keeps the rows of the buffer after every step."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.append(self.trainer.buffer.rows)


def test_block_model_masks_the_response_only(text_trainer: Callable[..., RelayTrainer]) -> None:
    rows, expected, changes = FORMATS["messages, assistant only"]
    snapshots = Snapshots()
    trainer = text_trainer(rows * 4, options={"callbacks": [snapshots]}, **changes)
    snapshots.trainer = trainer
    trainer.train()
    learned = {"".join(turns[1::2]).replace("¶", "[EOS]") for turns in expected}
    assert len(snapshots.rows) == 4
    for kept in snapshots.rows:
        for ids, is_learned in zip(kept.clean_ids, kept.learned, strict=True):
            assert trainer.processing_class.decode(ids[is_learned]) in learned
        assert not (kept.masked & ~kept.learned).any()
    assert any(bool(kept.masked.any()) for kept in snapshots.rows), "every step revealed everything"


@pytest.mark.parametrize("block_size", [4, None])
def test_loss_is_the_mean_over_the_response(text_trainer: Callable[..., RelayTrainer], block_size: int | None) -> None:
    rows = FORMATS["prompt and completion"][0][:1]
    model = build_text_model(block_size=block_size)
    trainer = text_trainer(rows, model, {"eval_dataset": Dataset.from_list(rows)}, rollout_steps=1)
    batch = next(iter(trainer.get_eval_dataloader()))
    # The response has positions 8 to 10, which lie in one block: it is denoised behind nothing but clean text.
    # Position 11, which fills the block up, is a [MASK] as well; nobody learns it.
    labels = batch["labels"] if block_size is None else F.pad(batch["labels"], (0, 1), value=-100)
    noisy = F.pad(batch["input_ids"], (0, labels.shape[1] - batch["input_ids"].shape[1]), value=258)
    noisy = noisy.where(labels == -100, 258)
    expected = model.eval()(noisy, labels=labels).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("block_size", [4, None])
def test_padding_does_not_change_the_loss(text_trainer: Callable[..., RelayTrainer], block_size: int | None) -> None:
    """Responses of one length behind prompts of different lengths: the mean over rows is that over batches."""
    rows = [{"prompt": "x" * length, "completion": "abc"} for length in (1, 6, 13)]
    model = build_text_model(block_size=block_size, relay_init="ones")
    losses = []
    for size in (1, 3):
        options = {"eval_dataset": Dataset.from_list(rows)}
        trainer = text_trainer(rows, model, options, unmasking_threshold=1.0, per_device_eval_batch_size=size)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_smaller_last_batch_refills_as_many_rows_as_it_has(text_trainer: Callable[..., RelayTrainer]) -> None:
    rows = [{"prompt": "ab", "completion": str(digit)} for digit in range(5)]
    # At threshold 0 every row is finished after one step.
    trainer = text_trainer(rows, unmasking_threshold=0.0, rows_on_demand=False)
    trainer.train()
    assert logged(trainer, "buffer_refills") == [4, 1, 4, 1]
    assert logged(trainer, "masked_fraction") == [1, 0.25, 1, 0.25]
    assert all(loss > 0 for loss in logged(trainer, "loss"))


def test_evaluation_of_text_is_the_same_in_any_form(text_trainer: Callable[..., RelayTrainer]) -> None:
    rows, expected, _ = FORMATS["prompt and completion"]
    data = Dataset.from_list(rows)
    trainer = text_trainer(
        rows, build_text_model(block_size=None), {"eval_dataset": data}, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    passes = watch(trainer)
    single = trainer.evaluate()["eval_loss"]
    assert set(passes[0]) == {hidden(turns) for turns in expected}
    assert logged(trainer, "eval_loss")[1:] == [single, single], "while training, then of the weights as they are"
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(single)
    several = DatasetDict({"rows": data})
    assert trainer.evaluate(several)["eval_rows_loss"] == pytest.approx(single)
    named = {"rows": data, "stream": data.to_iterable_dataset()}
    other = text_trainer(rows, trainer.model, {"eval_dataset": named})
    losses = other.evaluate()
    assert losses["eval_rows_loss"] == pytest.approx(single)
    assert losses["eval_stream_loss"] == pytest.approx(single)


# -- precision and adapters -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_text_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bf16", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("backbone", ["fp32", "bf16", "cast to bf16"])
def test_lora_trains_the_channel_in_full_and_in_fp32(
    text_trainer: Callable[..., RelayTrainer], saved_base: Path, backbone: str, bf16: bool
) -> None:
    dtype = torch.bfloat16 if backbone == "bf16" else torch.float32
    model = RelayForMaskedDiffusion.from_pretrained(saved_base, dtype=dtype)
    if backbone == "cast to bf16":
        model.to(torch.bfloat16)
    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = text_trainer(model=model, options={"peft_config": adapters}, bf16=bf16, learning_rate=1e-2)
    before = weights(trainer.model)
    trainer.train()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    channel = {name for name in trained if "relay" in name.split(".")}
    assert len(channel) == 2
    assert all("lora" in name for name in trained.keys() - channel)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())
    frozen = {name: p for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, before[name]) for name, p in frozen.items())


@pytest.mark.parametrize("objective", ["relay", "relay_sg", "rollout", "masked"])
def test_bf16_training_keeps_fp32_weights_and_nearly_the_same_losses(
    text_trainer: Callable[..., RelayTrainer], objective: str
) -> None:
    losses = []
    for bf16 in (False, True):
        trainer = text_trainer(objective=objective, bf16=bf16, model=build_text_model(relay_init="ones"))
        trainer.train()
        losses.append(logged(trainer, "loss"))
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        if objective.startswith("relay"):
            assert trainer.buffer.rows.relay_state.dtype == torch.float32
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1], "autocast was off"


def test_lora_folder_loads_by_auto_model(
    text_trainer: Callable[..., RelayTrainer], saved_base: Path, tmp_path: Path
) -> None:
    model = RelayForMaskedDiffusion.from_pretrained(saved_base)
    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = text_trainer(model=model, options={"peft_config": adapters}, learning_rate=1e-2, relay_learning_rate=0.5)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = AutoModel.from_pretrained(tmp_path / "adapter").eval()
    ids, state = torch.arange(12)[None], torch.randn(1, 12, 16)
    expected = trainer.model.eval()(ids, relay_state=state).logits
    torch.testing.assert_close(loaded(ids, relay_state=state).logits, expected)
    assert loaded.generate(ids, max_new_tokens=4).shape == (1, 16)


# -- what is left on disk ---------------------------------------------------------------------------------------------

REPLY = """
import sys
import relay_hf
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModel.from_pretrained(sys.argv[1])
for question in sys.argv[2:]:
    talk = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=12)
    print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]))
"""


def test_output_folder_alone_answers_what_was_learned(text_trainer: Callable[..., RelayTrainer]) -> None:
    """Learned by heart, saved, and asked in a new process that knows nothing but the folder."""
    talks = [said("hi", "hello"), said("sum", "four"), said("color", "blue")]
    wide = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.1}
    trainer = text_trainer(
        [{"messages": talk} for talk in talks] * 4,
        build_text_model(wide, block_size=8),
        assistant_only_loss=True,
        max_steps=100,
        learning_rate=1e-2,
        per_device_train_batch_size=6,
        unmasking_threshold=0.9,
    )
    trainer.train()
    trainer.save_model()
    folder = trainer.args.output_dir
    assert AutoTokenizer.from_pretrained(folder).chat_template == trainer.processing_class.chat_template
    command = [sys.executable, "-c", REPLY, folder, *(talk[0]["content"] for talk in talks)]
    answers = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert answers == ["hello[EOS]", "four[EOS]", "blue[EOS]"]
