"""What cannot be trained on is refused in one sentence before training starts; what can, is trained on."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from relay_hf.trainers import RelayTrainer

from .test_relay_trainer import logged
from .text import build_text_model, build_tokenizer

GOOD = [{"prompt": "2 + 2 = ", "completion": "4."}, {"prompt": "one, two, ", "completion": "three"}]
LONG = {"prompt": "x" * 40, "completion": "too late"}
NO_ROWS = Dataset.from_dict({"prompt": [], "completion": []})


def nothing() -> Iterator[dict[str, str]]:
    yield from ()


@pytest.fixture
def build(make_trainer: Callable[..., RelayTrainer]) -> Callable[..., RelayTrainer]:
    """Makes a trainer, by default one that can train."""

    def make(
        rows: Any = GOOD, tokenizer: Any = None, model: Any = None, options: dict | None = None, **changes: Any
    ) -> RelayTrainer:
        return make_trainer(
            build_text_model() if model is None else model,
            Dataset.from_list(rows) if isinstance(rows, list) else rows,
            {"processing_class": build_tokenizer() if tokenizer is None else tokenizer, **(options or {})},
            **{"max_steps": 1, **changes},
        )

    return make


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (NO_ROWS, {}, "The training set has no rows: check where it is loaded from"),
        (Dataset.from_dict({"input_ids": [], "labels": []}), {}, "The training set has no rows"),
        (IterableDataset.from_generator(nothing), {}, "The training set has no rows"),
        ([{"question": "2 + 2", "answer": "4"}], {}, r"has the columns \['answer', 'question'\], .* give `prompt` and"),
        ([{"prompt": "2 + 2"}], {}, r"has the columns \['prompt'\], none of which says what to learn"),
        ([{"text": "a"}], {"dataset_text_field": "poem"}, r"columns \['text'\], .* `poem` \(named by `dataset_text_fi"),
        ([LONG], {"max_length": 20}, "All labels of the training set are -100, .* that `max_length` leaves room"),
        (Dataset.from_list([LONG]).to_iterable_dataset(), {"max_length": 20}, "No row of the training set is left"),
        (GOOD, {"max_length": 1}, "All labels of the training set are -100"),
        ([{"prompt": "a", "completion": "[MASK][MASK]"}], {}, "training set has the mask token"),
        ([{"input_ids": [258] * 4, "labels": [258] * 4}], {}, r"training set has the mask token \(id 258\) among what"),
        ([{"input_ids": [65, 259]}], {}, "has the token id 259, but the model has 259 tokens: tokenize with"),
        ([{"input_ids": [65, -1]}], {}, "has the token id -1, but the model has 259 tokens"),
        ([{"input_ids": [65, 66], "labels": [65, 66, 67]}], {}, "Row 0 .* 3 numbers in `labels` for 2 `input_ids`"),
    ],
)
def test_data_without_anything_to_learn_raises(
    build: Callable[..., RelayTrainer], rows: Any, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(rows, **changes)


@pytest.mark.parametrize("data", [NO_ROWS, {"small": NO_ROWS}], ids=["single", "dict"])
def test_empty_evaluation_set_raises(build: Callable[..., RelayTrainer], data: Any) -> None:
    with pytest.raises(ValueError, match=r"The data set `(eval|small)` has no rows"):
        build(options={"eval_dataset": data})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_steps": 0}, "`rollout_steps=0` must be at least 1"),
        ({"rollout_steps": 1.5}, "`rollout_steps=1.5` must be at least 1, and whole"),
        ({"unmasking_threshold": -0.1}, "`unmasking_threshold=-0.1` is not a probability"),
        ({"unmasking_threshold": 1.1}, "`unmasking_threshold=1.1` is not a probability"),
        ({"unmasking_threshold": float("nan")}, "`unmasking_threshold=nan` is not a probability"),
        ({"max_length": 0}, "`max_length=0` must be at least 1, and whole; `None` keeps texts whole"),
        ({"max_length": -1}, "`max_length=-1` must be at least 1"),
    ],
)
def test_argument_out_of_range_raises(build: Callable[..., RelayTrainer], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_model_without_channel_raises(build: Callable[..., RelayTrainer]) -> None:
    with pytest.raises(
        ValueError,
        match=r"needs a channel that can be .*, but the model has `relay_channel='none'`: load it",
    ):
        build(model=build_text_model(relay_channel="none"))


def test_tokenizer_that_cannot_end_a_text_raises(build: Callable[..., RelayTrainer]) -> None:
    with pytest.raises(ValueError, match="The tokenizer has no `eos_token` to end the texts of the training set with"):
        build(tokenizer=build_tokenizer(eos_token=None))


def pad_on_the_left(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    columns = {"input_ids": 257, "labels": -100, "attention_mask": 0}
    full = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: torch.tensor([[filler] * (length - len(row[name])) + row[name] for row in full])
        for name, filler in columns.items()
    }


def test_collator_that_pads_on_the_left_raises_at_the_first_batch(build: Callable[..., RelayTrainer]) -> None:
    trainer = build(options={"data_collator": pad_on_the_left})
    with pytest.raises(ValueError, match=r"The batch is padded on the left: .* pad on the right"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [65, 258], "labels": [65, 258]}, r"Row 3 of the training set has the mask token \(id 258\)"),
        ({"input_ids": [65, 66], "labels": [66, 67]}, "Row 3 of the training set has labels that differ from"),
        ({"input_ids": [65, 259], "labels": [65, -100]}, "Row 3 of the training set has the token id 259, but the mod"),
        ({"input_ids": [-7, 65], "labels": [-100, 65]}, "Row 3 of the training set has the token id -7, but the mod"),
        ({"input_ids": [65, 66], "labels": [65]}, "Row 3 of the training set has 1 numbers in `labels` for 2"),
        ({"input_ids": None, "labels": [65]}, "Row 3 of the training set has `None` in the column `input_ids`"),
    ],
)
def test_bad_row_of_a_stream_raises_when_it_comes(
    build: Callable[..., RelayTrainer], row: dict[str, list[int]], message: str
) -> None:
    good = {"input_ids": [65, 66], "labels": [65, 66]}
    trainer = build(Dataset.from_list([good] * 3 + [row]).to_iterable_dataset(), max_length=None)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


# -- works ------------------------------------------------------------------------------------------------------------


def learned(trainer: RelayTrainer) -> set[str]:
    """Trains, and returns what the rows in the buffer teach."""
    trainer.train()
    assert all(loss > 0 for loss in logged(trainer, "loss"))
    rows = trainer.buffer.rows
    texts = (trainer.processing_class.decode(i[m]) for i, m in zip(rows.clean_ids, rows.learned, strict=True))
    return {text for text in texts if text}  # a batch larger than the data set leaves places empty


def test_row_with_an_empty_response_teaches_to_stop(build: Callable[..., RelayTrainer]) -> None:
    rows = [{"prompt": "Silence!", "completion": ""}, *GOOD]
    assert learned(build(rows)) == {"[EOS]", "4.[EOS]", "three[EOS]"}


def test_row_whose_prompt_fills_max_length_is_left_out_with_a_warning(
    build: Callable[..., RelayTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build([LONG, *GOOD], max_length=20)
    assert len(trainer.train_dataset) == 2
    assert "1 of 3 rows of the training set are left out: `max_length` leaves no room" in caplog.text
    assert learned(trainer) == {"4.[EOS]", "three[EOS]"}


def test_tokenizer_without_pad_token_pads_with_its_end_of_text(build: Callable[..., RelayTrainer]) -> None:
    tokenizer = build_tokenizer(pad_token=None)
    trainer = build(tokenizer=tokenizer, model=build_text_model(mask_token_id=257))
    # Padding and the end of a text are one token now, but only the latter is learned.
    assert learned(trainer) == {"4.[EOS]", "three[EOS]"}
    assert trainer.model.config.text_config.pad_token_id == tokenizer.eos_token_id == 256


def test_tokenizer_without_end_of_text_can_chat(build: Callable[..., RelayTrainer]) -> None:
    """A chat template ends turns by itself."""
    tokenizer = build_tokenizer(eos_token=None)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }};{% endfor %}"
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert learned(build([{"messages": talk}], tokenizer, build_text_model(mask_token_id=257))) == {"hi;hello;"}


def test_tokenizer_that_pads_on_the_left_is_no_concern(build: Callable[..., RelayTrainer]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    assert learned(build(tokenizer=tokenizer)) == {"4.[EOS]", "three[EOS]"}


def test_mask_token_in_the_prompt_stays_there(build: Callable[..., RelayTrainer]) -> None:
    assert learned(build([{"prompt": "Fill [MASK]: ", "completion": "x"}])) == {"x[EOS]"}


def test_batch_larger_than_the_data_set_gives_the_same_loss(build: Callable[..., RelayTrainer]) -> None:
    losses = []
    for size in (2, 8):
        trainer = build(per_device_train_batch_size=size, staggered_start=False)
        assert learned(trainer) == {"4.[EOS]", "three[EOS]"}
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_trainer_activation_offloading_on_a_cpu_raises(make_trainer: Callable[..., RelayTrainer]) -> None:
    with pytest.raises(ValueError, match="`activation_offloading=True` moves activations from an accelerator"):
        make_trainer(activation_offloading=True)


def test_trainer_predict_raises(make_trainer: Callable[..., RelayTrainer]) -> None:
    with pytest.raises(ValueError, match="no single set of logits: call `evaluate`, or `generate`"):
        make_trainer().predict(Dataset.from_list([{"prompt": "a", "completion": "b"}]))
