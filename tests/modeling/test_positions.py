"""Texts against the positions that a model has: tables of learned ones end, computed ones only grow strange."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, OPTConfig, PreTrainedConfig

from relay_hf import RelayConfig, RelayForMaskedDiffusion, RelayTrainer, RelayTrainerConfig
from relay_hf.evaluation.likelihood import LikelihoodBound
from relay_hf.testing import byte_tokenizer

from ..conftest import MASK, VOCAB_SIZE
from .decoding import PAD, decode_alone, new_tokens_of, padded, prompt_of, prompts_of, run

SIZES: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
# 20 positions: the third block of eight has room for four.
TABLES = [
    GPT2Config(**SIZES, n_positions=20, initializer_range=0.5),
    OPTConfig(**SIZES, max_position_embeddings=20, init_std=0.5, word_embed_proj_dim=16, ffn_dim=32),
]
each_table = pytest.mark.parametrize("backbone", TABLES, ids=lambda config: config.model_type)


def build(backbone: PreTrainedConfig, **options: Any) -> RelayForMaskedDiffusion:
    torch.manual_seed(0)
    fields = {"block_size": 8, "mask_token_id": MASK, "token_shift": True, **options}
    return RelayForMaskedDiffusion(RelayConfig(text_config=copy.deepcopy(backbone), **fields)).eval()


def test_tables_of_positions_are_told_from_computed_ones(make_model: Any) -> None:
    assert [build(backbone).learned_positions for backbone in TABLES] == [20, 20]
    assert make_model().learned_positions is None


@each_table
@pytest.mark.parametrize("fuse_commits", [False, True])
def test_last_block_is_filled_up_to_the_end_of_the_table(backbone: PreTrainedConfig, fuse_commits: bool) -> None:
    model = build(backbone)
    prompts = prompts_of((13, 3, 8))
    output = run(model, padded(prompts[:1], "left"), max_new_tokens=7, fuse_commits=fuse_commits)
    assert new_tokens_of(output, 13, PAD, None)[0].tokens != [PAD] * 7
    # A row ends at the table's end, whoever shares its batch.
    batch = run(model, padded(prompts, "left"), max_new_tokens=7, fuse_commits=fuse_commits)
    assert torch.equal(batch.sequences[0], output.sequences[0])


@each_table
def test_text_inside_the_table_decodes_as_the_plain_loop(backbone: PreTrainedConfig) -> None:
    model, prompts = build(backbone), prompts_of((3, 8))
    output = run(model, padded(prompts, "left"), max_new_tokens=8)
    assert new_tokens_of(output, 8, PAD, None) == [
        decode_alone(model, p, 8, threshold=0.3, sub_block_size=8) for p in prompts
    ]


@each_table
@pytest.mark.parametrize("block_size", [8, None])
def test_text_beyond_the_table_is_refused_before_any_forward(
    backbone: PreTrainedConfig, block_size: int | None
) -> None:
    model = build(backbone, block_size=block_size)
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("a forward"))
    with pytest.raises(ValueError, match="take 21 positions, but the model has learned 20: shorten the prompt"):
        run(model, prompt_of(13), max_new_tokens=8)
    with pytest.raises(ValueError, match="reach position 20, but the backbone has learned 20 positions"):
        model(prompt_of(21))


@each_table
@pytest.mark.parametrize("block_size", [8, None])
def test_training_and_likelihood_take_rows_as_long_as_the_table(
    backbone: PreTrainedConfig, block_size: int | None, tmp_path: Path
) -> None:
    rows = torch.randint(3, MASK, (4, 20), generator=torch.Generator().manual_seed(0)).tolist()
    trainer = RelayTrainer(
        build(backbone, block_size=block_size),
        RelayTrainerConfig(
            str(tmp_path), max_steps=1, per_device_train_batch_size=4, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, logging_steps=1,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=byte_tokenizer(pad_token="!", eos_token='"', mask_token=None),
    )  # fmt: skip
    trainer.train()
    assert torch.tensor(trainer.state.log_history[0]["loss"]).isfinite()
    bound = LikelihoodBound(trainer.model.eval(), samples=2, seed=0)
    ((_, nats),) = bound([(rows[0][:10], rows[0][10:])])
    assert -1000 < nats < 0


@pytest.mark.parametrize("block_size", [8, None])
def test_text_beyond_computed_positions_warns_once(make_model: Any, block_size: int | None) -> None:
    model = make_model(block_size=block_size, text={"max_position_embeddings": 32})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model.generate(prompt_of(27), max_new_tokens=5)
        assert caught == []
        for length in (28, 29):
            model.generate(prompt_of(length), max_new_tokens=5)
    (warning,) = caught
    assert "more positions than the 32 of the model's `max_position_embeddings`" in str(warning.message)
